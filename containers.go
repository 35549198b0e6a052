package main

import (
	"cmp"
	"errors"
	"fmt"
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
	byID    map[string]*container // all of the last list that have an id and a name
	before  map[string]*container // byID at the poll before
	holders map[string]*container // those that have a path of metrics, by that path
	ends    map[string]*ends      // by path, from the first answer to /events on
}

type container struct {
	listed        // what the last list said of it
	name   string // without Docker's leading slash
	madeOf string // its image, "" until it is known
	naming        // without a path until the rules were applied
	host   string // the name of the host when that was
	err    error  // why it is left out: the rules could not be applied, or a *collision

	facts
	up       time.Duration // since it was last started, when it was last sampled
	last     *cpuSample    // nil if there is none to compare with
	ends     *ends         // those of its path, nil if they are not known
	hasEnded bool          // whether the last poll found that it has just ended
	news     news
}

// facts are what only inspect tells.
type facts struct {
	checkedAt time.Time // when it was last asked; zero: they may have changed
	startedAt time.Time // zero if it is not known
	restarts  count     // by its restart policy
	exitCode  int       // of its last run
	cpuLimit  float64   // in CPUs, 0 for none
	health    string    // "" for a container without a health check
}

// ends counts how runs under one path ended. A container that is made anew under its name goes on
// with them.
type ends struct {
	counts eventCounts
	seen   time.Time // when a container had the path
}

// endsKept is how long ends are kept of a path that no container has.
const endsKept = 24 * time.Hour

// census is what one list says of the running containers, and what the rules make of them.
type census struct {
	at         time.Time // by the engine's clock
	running    int
	paused     int            // of those
	restarting int            // likewise
	asked      []*container   // those to ask
	left       []*container   // those that are left out: see their err
	ended      []string       // paths that no container has, but of which something is to be sent
	categories map[string]int // how many the rules put in each
}

type collision struct{ path, holder string }

func (c *collision) Error() string { return c.holder + " has this name already" }

// usualID matches what can be the id of a container. It becomes a part of a URL.
var usualID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$`)

// remember takes over a list, and forgets all that is not in it. An entry without an id or a name
// is being made or removed: it is left out, but keeps the name it had.
func (cs *containers) remember(list []listed) {
	byID := make(map[string]*container, len(list))
	for _, entry := range list {
		known := cs.byID[entry.ID]
		if known == nil {
			known = new(container)
		}
		name := cmp.Or(nameOf(&entry), known.name)
		if !usualID.MatchString(entry.ID) || byID[entry.ID] != nil || name == "" {
			cs.log.Debug("list entry without an id or a name of its own", "id", entry.ID)
			continue
		}
		byID[entry.ID] = known
		known.listed, known.err = entry, nil
		if name != known.name {
			known.name, known.naming = name, naming{}
		}
	}
	cs.before, cs.byID = cs.byID, byID
}

// imageless returns the containers whose rules look at an image that only inspect knows: a newer
// one has taken its name.
func (cs *containers) imageless() (list []*container) {
	if !slices.ContainsFunc(cs.rules, func(r rule) bool { return r.from == "image" }) {
		return nil
	}
	for _, known := range cs.byID {
		if known.madeOf == "" && imageID.MatchString(known.Image) {
			list = append(list, known)
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
			who := subject{known.name, known.ID, known.madeOf, textsOf(known.Labels)}
			known.host = host
			known.naming, known.err = cs.nameOn(host, who)
		}
		known.Labels = nil // they may be long
	}
}

// nameOn applies the rules to who. While the host's name is unknown, some fail.
func (cs *containers) nameOn(host string, who subject) (naming, error) {
	n := cs.rules.apply(who, host)
	if host == "" && n != cs.rules.apply(who, "other") {
		return naming{}, errNoHost
	}
	return n, nil
}

// share gives each path to one container: to the one that has it already, else to the oldest.
func (cs *containers) share() *census {
	found := &census{running: len(cs.byID), categories: map[string]int{}}
	all := slices.SortedFunc(maps.Values(cs.byID), func(a, b *container) int {
		return cmp.Or(cmp.Compare(a.Created, b.Created), cmp.Compare(a.ID, b.ID))
	})
	holders := make(map[string]*container, len(all))
	for _, known := range all {
		known.ends = nil // until it is known that there are events
		found.count(known)
		if !known.drop && cs.holders[known.path] == known {
			holders[known.path] = known
		}
	}
	cs.holders = holders
	for _, known := range all {
		if known.drop {
			continue
		}
		if known.err == nil {
			holder := holders[known.path]
			if holder == nil {
				holder, holders[known.path] = known, known
			}
			if holder == known {
				found.asked = append(found.asked, known)
				continue
			}
			known.err = &collision{known.path, holder.name}
		}
		known.last = nil
		found.left = append(found.left, known)
	}
	isTroubled := func(known *container) int { return min(len(known.news.said), 1) }
	slices.SortStableFunc(found.asked, func(a, b *container) int {
		return isTroubled(a) - isTroubled(b) // those that may hang go last
	})
	return found
}

func (found *census) count(known *container) {
	switch known.state() {
	case "paused":
		found.paused++
	case "restarting":
		found.restarting++
	}
	if known.category != "" {
		found.categories[known.category]++
	}
}

// learnEvents takes over what happened on that host: what inspect told may not be right any more,
// and how containers ended is counted, also of those that are gone.
func (cs *containers) learnEvents(fresh []event, found *census, host string) {
	now := time.Now()
	kept := make(map[string]*ends, len(found.asked))
	for _, known := range found.asked {
		if known.ends = cs.ends[known.path]; known.ends == nil {
			known.ends = new(ends)
		}
		known.ends.seen = now
		kept[known.path] = known.ends
	}
	for path, its := range cs.ends {
		if now.Sub(its.seen) < endsKept {
			kept[path] = its
		}
	}
	cs.ends = kept
	for i := range fresh {
		one := &fresh[i]
		id, kind := one.key().id, one.kind()
		known := cmp.Or(cs.byID[id], cs.before[id])
		if known != nil && (kind == started || kind == updated) {
			known.forget()
		}
		if kind != killed && kind != failed {
			continue
		}
		path := cs.pathOf(known, one, host)
		its := cs.ends[path]
		if its == nil {
			continue // none that was ever sampled
		}
		its.counts[kind]++
		if cs.holders[path] == nil && !slices.Contains(found.ended, path) {
			found.ended = append(found.ended, path)
		}
	}
}

// pathOf returns the path of the container of an event, which is known if it is or was in the list.
// It is "" for one that has none of its own: it is left out, or lived beside the one that has it.
func (cs *containers) pathOf(known *container, one *event, host string) string {
	if known != nil {
		if known.err != nil || known.drop {
			return ""
		}
		return known.path
	}
	its := textsOf(one.Actor.Attributes)
	who := subject{its["name"], one.key().id, its["image"], its}
	n, err := cs.nameOn(host, who)
	holder := cs.holders[n.path]
	if err != nil || n.drop || who.name == "" || holder != nil && cs.before[holder.ID] != nil {
		return ""
	}
	return n.path
}

func (e *ends) isAny() bool { return e.counts != eventCounts{} }

func (e *ends) flatten(f *flattener) {
	f.addCount(".oom_kills", e.counts[killed])
	f.addCount(".failed_exits", e.counts[failed])
}

// refresh is after what time inspect is asked again in any case: an event can be missed.
const refresh = 10 * time.Minute

// isStale reports whether what inspect told may be wrong. That is so, too, if the CPU time that the
// container has used fell since the last sample: it was started anew. Without events, it always may
// be.
func (known *container) isStale(cpu count, hasEvents bool) bool {
	return !hasEvents || known.checkedAt.IsZero() || time.Since(known.checkedAt) > refresh ||
		known.healthStatus() == "" && known.facts.health != "" ||
		known.last != nil && cpu.sent && cpu.n < known.last.total
}

// learn takes over what inspect says. Of one that does not run just now, that will change soon.
func (known *container) learn(seen *inspected) {
	started, _ := time.Parse(time.RFC3339Nano, seen.State.StartedAt)
	if !started.Equal(known.startedAt) {
		known.up = 0
	}
	known.facts = facts{startedAt: started, restarts: seen.RestartCount,
		exitCode: seen.State.ExitCode, cpuLimit: seen.cpuLimit()}
	if seen.State.Running && !seen.State.Restarting {
		known.checkedAt = time.Now()
	}
	if health := seen.State.Health.Status; health != "none" {
		known.facts.health = health
	}
}

func (known *container) learnImage(seen *inspected, err error) {
	if err != nil {
		known.err = fmt.Errorf("its image: %w", err)
		return
	}
	known.learn(seen)
	known.madeOf = cmp.Or(seen.Config.Image, known.Image)
}

// forget is for a container that may have been restarted.
func (known *container) forget() { known.facts = facts{} }

// percent returns how much CPU it used since the last sample, and keeps this one.
func (known *container) percent(sample *cpuSample) (percent float64, ok bool) {
	percent, ok = sample.percentSince(known.last)
	known.last = sample
	return percent, ok
}

// judge returns err, of the poll, but errUnknown for a container that ended in two polls.
func (known *container) judge(err error) error {
	hasEnded := errors.Is(err, errStopped)
	if hasEnded && known.hasEnded {
		err = errUnknown
	}
	known.hasEnded = hasEnded
	return err
}

// noClock is before Docker's first release. Boards without a clock start in 1970.
var noClock = time.Date(2013, 1, 1, 0, 0, 0, 0, time.UTC)

// flatten adds what is known of a container beside its stats, at a time of the engine's.
func (known *container) flatten(f *flattener, at time.Time) {
	if known.startedAt.After(noClock) {
		if up := at.Sub(known.startedAt); up > 0 { // else its clock was set back
			known.up = up
		}
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
// has just ended does no harm.
func (cs *containers) report(known *container, err error) {
	log := cs.log.With("container", known.name)
	wasLooping := known.news.said == errRestarting.Error()
	var taken *collision
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
	case errors.As(err, &taken):
		log.Warn("container left out: another one has the same name in its metrics; "+
			"--prefix can tell them apart", "other", taken.holder, "metrics", taken.path)
	default:
		log.Error("container cannot be read", "error", errorText(err))
	}
}

// nameOf returns a container's name by the list, "" if that has none. Old engines also list the
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
	return last
}
