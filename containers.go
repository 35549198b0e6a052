package main

import (
	"cmp"
	"errors"
	"log/slog"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"
)

// containers is what is kept of the running containers from one sweep to the next.
type containers struct {
	rules   rules
	log     *slog.Logger
	byID    map[string]*container // all of the last list
	holders map[string]*container // those that have a path of metrics, by that path
}

// container is what is kept of one of them.
type container struct {
	listed        // what the last list said of it
	name   string // without Docker's leading slash
	madeOf string // its image, "" until it is known
	naming        // without a path until the rules were applied
	host   string // the name of the host when that was
	err    error  // why they could not be applied

	facts
	checkedAt time.Time     // when inspect was last asked; zero: they may have changed
	up        time.Duration // since it was last started, when it was last sampled
	last      *cpuSample    // nil if there is none to compare with
	news      news
	shadowed  string // the name of the container that has its path, as logged
}

// facts are what only inspect tells.
type facts struct {
	startedAt time.Time // zero if it is not known
	restarts  count     // by its restart policy
	exitCode  int       // of its last run
	cpuLimit  float64   // in CPUs, 0 for none
	health    string    // "" for a container without a health check
}

// census is what one list says of the running containers, and what the rules make of them.
type census struct {
	running    int
	paused     int            // of those
	restarting int            // likewise
	asked      []*container   // those to ask
	unnamed    []*container   // those that have no path: see their err
	collisions int            // those left out because another one has their path
	categories map[string]int // how many the rules put in each
}

// usualID matches what can be the id of a container. It becomes a part of a URL.
var usualID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$`)

// remember takes over a list, and forgets all that is not in it.
func (cs *containers) remember(list []listed) {
	byID := make(map[string]*container, len(list))
	for _, entry := range list {
		if !usualID.MatchString(entry.ID) || byID[entry.ID] != nil {
			cs.log.Debug("list entry without an id of its own", "id", entry.ID)
			continue
		}
		known := cs.byID[entry.ID]
		if known == nil {
			known = new(container)
		}
		byID[entry.ID] = known
		known.listed, known.err = entry, nil
		if name := nameOf(&entry); name != known.name {
			known.name, known.naming = name, naming{}
		}
	}
	cs.byID = byID
}

// imageID is what a list shows when the image's name means another image by now.
var imageID = regexp.MustCompile(`^(sha256:[0-9a-f]{64}|[0-9a-f]{12,64})$`)

// imageless returns the containers whose rules look at an image that only inspect knows: a newer
// one has taken its name.
func (cs *containers) imageless() (list []*container) {
	if cs.rules.see("image") {
		for _, known := range cs.byID {
			if known.madeOf == "" && imageID.MatchString(known.Image) {
				list = append(list, known)
			}
		}
	}
	return list
}

var errNoHost = errors.New("its rule needs the host's name, which the engine has not sent yet")

// apply gives paths by the rules, on that host, to the containers without one. Where the host has
// another name now, they are made anew. While that is unknown, "", some cannot be made.
func (cs *containers) apply(host string) {
	for _, known := range cs.byID {
		if known.err == nil && (known.path == "" || known.host != host) {
			known.madeOf = cmp.Or(known.madeOf, known.Image)
			who := subject{known.name, known.ID, known.madeOf, known.labels()}
			known.naming, known.host = cs.rules.apply(who, host), host
			if host == "" && known.naming != cs.rules.apply(who, "other") {
				known.naming, known.err = naming{}, errNoHost
			}
		}
		known.Labels = nil // they may be long
	}
}

// share gives each path to one container: to the one that has it already, else to the oldest.
func (cs *containers) share() *census {
	now := &census{running: len(cs.byID), categories: map[string]int{}}
	all := slices.SortedFunc(maps.Values(cs.byID), func(a, b *container) int {
		return cmp.Or(cmp.Compare(a.Created, b.Created), cmp.Compare(a.ID, b.ID))
	})
	holders := make(map[string]*container, len(all))
	for _, known := range all {
		now.count(known)
		if !known.drop && cs.holders[known.path] == known {
			holders[known.path] = known
		}
	}
	cs.holders = holders
	for _, known := range all {
		if known.path == "" || known.drop {
			continue
		}
		holder := holders[known.path]
		if holder == nil {
			holder, holders[known.path] = known, known
		}
		if holder == known {
			known.shadowed = ""
			now.asked = append(now.asked, known)
			continue
		}
		now.collisions++
		known.last = nil
		if known.shadowed != holder.name {
			known.shadowed = holder.name
			cs.log.Warn("container left out: another one has the same name in its metrics; "+
				"--prefix can tell them apart",
				"container", known.name, "other", holder.name, "metrics", known.path)
		}
	}
	return now
}

// count counts a container by its state, and by what the rules make of it.
func (now *census) count(known *container) {
	switch known.state() {
	case "paused":
		now.paused++
	case "restarting":
		now.restarting++
	}
	if known.path == "" {
		now.unnamed = append(now.unnamed, known)
	}
	if known.category != "" {
		now.categories[known.category]++
	}
}

// changed says that what inspect told of some containers is not right any more.
func (cs *containers) changed(ids []string) {
	for _, id := range ids {
		if known := cs.byID[id]; known != nil {
			known.checkedAt = time.Time{}
		}
	}
}

// refresh is after what time inspect is asked again in any case: an event can be missed.
const refresh = 10 * time.Minute

// isStale reports whether what inspect told may be wrong. That is so, too, if the CPU time that the
// container has used fell since the last sample: it was started anew.
func (known *container) isStale(cpu count) bool {
	return known.checkedAt.IsZero() || time.Since(known.checkedAt) > refresh ||
		known.healthStatus() == "" && known.facts.health != "" ||
		known.last != nil && cpu.sent && cpu.n < known.last.total
}

// learn takes over what inspect says. Of one that does not run just now, that will change soon.
func (known *container) learn(now *inspected) {
	known.checkedAt = time.Time{}
	if now.State.Running && !now.State.Restarting {
		known.checkedAt = time.Now()
	}
	known.startedAt, _ = time.Parse(time.RFC3339Nano, now.State.StartedAt)
	known.restarts, known.exitCode = now.RestartCount, now.State.ExitCode
	known.cpuLimit = now.cpuLimit()
	known.facts.health = ""
	if health := now.State.Health.Status; health != "none" {
		known.facts.health = health
	}
}

// noClock is before Docker's first release. Boards without a clock start in 1970.
var noClock = time.Date(2013, 1, 1, 0, 0, 0, 0, time.UTC)

// flatten adds what is known of a container beside its stats, which were read at the engine's time
// read.
func (known *container) flatten(f *flattener, read time.Time) {
	if known.startedAt.After(noClock) {
		known.up = max(read.Sub(known.startedAt), 0)
		f.addCount(".uptime", int(known.up/time.Second))
	}
	f.add(".restarts", known.restarts)
	if known.cpuLimit > 0 {
		f.addDecimal(".cpu.limit", known.cpuLimit)
	}
	switch cmp.Or(known.healthStatus(), known.facts.health) {
	case "healthy":
		f.addCount(".health", 1)
	case "unhealthy":
		f.addCount(".health", 0)
	}
}

// report logs what is wrong with a container, or that it is well again, if that is news. One that
// is gone does no harm.
func (cs *containers) report(known *container, err error) {
	log := cs.log.With("container", known.name)
	wasLooping := known.news.said == errRestarting.Error()
	switch {
	case errors.Is(err, errStopped):
		log.Debug("container is gone", "reason", errorText(err))
	case err == nil && wasLooping && known.up < time.Minute:
		return // it may end again soon
	case !known.news.isNew(errorText(err)):
		return
	case err == nil && wasLooping:
		log.Info("container stays up again")
	case err == nil:
		log.Info("container can be read again")
	case errors.Is(err, errRestarting):
		log.Warn("container is in a restart loop",
			"restarts", known.restarts.n, "exit_code", known.exitCode)
	default:
		log.Error("container cannot be read", "error", errorText(err))
	}
}

// nameOf returns a container's name by the list, or the start of its id. Old engines also list the
// aliases that links gave it, as /other/alias, and a classic Swarm has the node before the name, as
// /node/name.
func nameOf(entry *listed) string {
	last := ""
	for _, name := range entry.Names {
		name = strings.TrimPrefix(name, "/")
		slash := strings.LastIndexByte(name, '/')
		if slash < 0 && name != "" {
			return name
		}
		last = cmp.Or(last, name[slash+1:])
	}
	const short = 12
	return cmp.Or(last, fit(entry.ID, short))
}
