package main

import (
	"cmp"
	"errors"
	"log/slog"
	"maps"
	"regexp"
	"slices"
	"strconv"
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
	id     string
	name   string // without Docker's leading slash
	remark string // what is odd about its name, as logged, "" for nothing
	host   string // the name of the host when the container was named
	naming
	// What the list said of it
	created    int64  // Unix seconds
	image      string // what it was made of, "" until it has a path
	status     string
	health     string // "" if the list does not tell
	restarting bool   // whether it waits to be started again

	facts
	checkedAt time.Time  // when inspect was last asked, by the engine's clock
	stale     bool       // whether they may have changed since then
	last      *cpuSample // nil if there is none to compare with
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
	paused     int              // of those
	restarting int              // likewise
	asked      []*container     // those to ask
	imageless  []*imageless     // those to ask whose names depend on inspect
	unnamed    map[string]error // those that cannot be asked, by id
	collisions int              // those left out because another one has their path
	categories map[string]int   // how many the rules put in each
}

// imageless is a container whose rules look at its image, which only inspect knows: a newer image
// has taken the name.
type imageless struct {
	*container
	who subject
}

// remember takes over a list of the engine's time at, and forgets all that is not in it. A
// container whose name has that of the host in it cannot be named while that is unknown: "".
func (cs *containers) remember(list []listed, host string, at time.Time) *census {
	now := &census{unnamed: map[string]error{}}
	byID := make(map[string]*container, len(list))
	for i := range list {
		listed := &list[i]
		id := listed.ID
		if !usualID.MatchString(id) { // it cannot be asked, and needs an id of its own here
			id = "entry " + strconv.Itoa(i+1)
			now.unnamed[id] = errors.New("the engine's list has no usable id of it")
		}
		if byID[id] != nil {
			cs.log.Debug("list entry there twice", "id", id)
			continue
		}
		known := cs.byID[id]
		if known == nil {
			known = &container{id: id, created: listed.Created}
		}
		byID[id] = known
		now.count(listed)
		cs.name(known, listed, host, now)
		known.status, known.health = startOf(listed.Status), startOf(listed.healthStatus())
		known.restarting = listed.isRestarting()
		known.stale = known.mayHaveChanged(at)
	}
	cs.byID, now.running = byID, len(byID)
	cs.share(now)
	return now
}

// usualID matches what can be the id of a container. It becomes a part of a URL.
var usualID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$`)

// count counts a container by its state.
func (now *census) count(listed *listed) {
	switch {
	case listed.isRestarting():
		now.restarting++
	case listed.isPaused():
		now.paused++
	}
}

// name gives a container its name, and a path by the rules.
func (cs *containers) name(known *container, listed *listed, host string, now *census) {
	name, remark := nameOf(listed)
	if remark != "" && remark != known.remark {
		cs.log.Warn("container has no usable name in the engine's list",
			"container", name, "reason", remark)
	}
	known.remark = remark
	who := subject{name: name, id: known.id, image: cmp.Or(known.image, listed.Image)}
	if !known.isNamed(name, host) && cs.rules.needLabels() {
		who.labels = listed.labels()
	}
	err := now.unnamed[known.id]
	switch {
	case err != nil:
	case known.image == "" && imageID.MatchString(listed.Image) && cs.rules.see("image"):
		known.name = name
		now.imageless = append(now.imageless, &imageless{known, who})
		return
	default:
		err = cs.apply(known, who, host)
	}
	if err != nil {
		now.unnamed[known.id] = err
		known.name, known.naming = name, naming{}
		cs.report(known, err)
	}
}

// isNamed reports whether the rules were applied to a container with this name, on this host.
func (known *container) isNamed(name, host string) bool {
	return known.path != "" && known.name == name && known.host == host
}

var errNoHost = errors.New("its rule needs the host's name, which the engine has not sent yet")

// apply gives a container the path that the rules make of who. It changes nothing else.
func (cs *containers) apply(known *container, who subject, host string) error {
	if host == "" && cs.rules.apply(who, "a") != cs.rules.apply(who, "b") {
		return errNoHost
	}
	if !known.isNamed(who.name, host) {
		known.name, known.host = who.name, host
		known.image = startOf(who.image)
		known.naming = cs.rules.apply(who, host)
	}
	return nil
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

// mayHaveChanged reports whether what inspect told may be wrong at the engine's time at. That is so
// if the container may have been started since it was checked: it is up for no longer than that.
func (known *container) mayHaveChanged(at time.Time) bool {
	since := at.Sub(known.checkedAt)
	return known.checkedAt.IsZero() || since > refresh ||
		upAtLeast(known.status) < since+2*time.Second ||
		known.health == "" && known.facts.health != ""
}

// learn takes over what inspect says at the engine's time at.
func (known *container) learn(now *inspected, at time.Time) {
	known.checkedAt, known.stale = at, false
	known.startedAt, _ = time.Parse(time.RFC3339Nano, now.State.StartedAt)
	known.restarts, known.exitCode = now.RestartCount, now.State.ExitCode
	known.cpuLimit = now.cpuLimit()
	switch health := now.State.Health.Status; health {
	case "starting", "healthy", "unhealthy":
		known.facts.health = health
	default: // such as "none"
		known.facts.health = ""
	}
}

// noClock is before Docker's first release. Boards without a clock start in 1970.
var noClock = time.Date(2013, 1, 1, 0, 0, 0, 0, time.UTC)

// flatten adds what is known of a container beside its stats, which were read at the engine's time
// read.
func (known *container) flatten(f *flattener, read time.Time) {
	if known.startedAt.After(noClock) {
		f.addCount(".uptime", int(max(read.Sub(known.startedAt), 0)/time.Second))
	}
	f.add(".restarts", known.restarts)
	if known.cpuLimit > 0 {
		f.addDecimal(".cpu.limit", known.cpuLimit)
	}
	switch cmp.Or(known.health, known.facts.health) {
	case "healthy":
		f.addCount(".health", 1)
	case "unhealthy":
		f.addCount(".health", 0)
	}
}

// share gives each path to one container: to the one that has it already, else to the oldest. It is
// called again when those without an image have their names.
func (cs *containers) share(now *census) {
	now.asked, now.collisions, now.categories = nil, 0, map[string]int{}
	all := slices.SortedFunc(maps.Values(cs.byID), func(a, b *container) int {
		return cmp.Or(cmp.Compare(a.created, b.created), cmp.Compare(a.id, b.id))
	})
	all = slices.DeleteFunc(all, func(known *container) bool {
		if known.category != "" {
			now.categories[known.category]++
		}
		return known.path == "" || known.drop
	})
	holders := make(map[string]*container, len(all))
	for _, known := range all {
		if cs.holders[known.path] == known {
			holders[known.path] = known
		}
	}
	cs.holders = holders
	for _, known := range all {
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
	isTroubled := func(known *container) int { return min(len(known.news.said), 1) }
	slices.SortStableFunc(now.asked, func(a, b *container) int {
		return isTroubled(a) - isTroubled(b) // those that may hang go last
	})
}

// holds reports whether a container has its path for itself.
func (cs *containers) holds(known *container) bool { return cs.holders[known.path] == known }

// report logs what is wrong with a container, or that it is well again, if that is news. One that
// is gone does no harm.
func (cs *containers) report(known *container, err error) {
	log := cs.log.With("container", known.name)
	wasLooping := known.news.said == errRestarting.Error()
	switch {
	case isGone(err):
		log.Debug("container is gone", "reason", errorText(err))
	case err == nil && wasLooping && upAtLeast(known.status) < time.Minute:
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

// imageID is what a list shows when the image's name means another image by now.
var imageID = regexp.MustCompile(`^(sha256:[0-9a-f]{64}|[0-9a-f]{12,64})$`)

// nameOf returns a container's name by the list. Old engines also list the aliases that links gave
// it, as /other/alias, and a classic Swarm has the node before the name, as /node/name. remark says
// why the name is not the container's own, if it is not.
func nameOf(listed *listed) (name, remark string) {
	for _, own := range listed.Names {
		own = strings.TrimPrefix(own, "/")
		if own != "" && !strings.Contains(own, "/") {
			return startOf(own), ""
		}
	}
	for _, long := range listed.Names {
		if name := long[strings.LastIndex(long, "/")+1:]; name != "" {
			return startOf(name), "the end of " + startOf(long)
		}
	}
	const short = 12
	return cmp.Or(fit(listed.ID, short), "?"), "it has none"
}

// upAtLeast returns how long a container is up for at least, by the Status of a list, such as
// "Up 2 hours (healthy)". It returns 0 for a status that does not say.
// https://pkg.go.dev/github.com/docker/go-units#HumanDuration
func upAtLeast(status string) time.Duration {
	status, _, _ = strings.Cut(status, " (")
	switch status {
	case "Up About a minute":
		return time.Minute
	case "Up About an hour":
		return time.Hour
	}
	words := strings.Fields(status)
	if len(words) != 3 || words[0] != "Up" {
		return 0
	}
	n, err := strconv.ParseUint(words[1], 10, 16)
	if err != nil {
		return 0
	}
	const hour, day = time.Hour, 24 * time.Hour
	unit := map[string]time.Duration{
		"second": time.Second, "minute": time.Minute, "hour": hour, "day": day,
		"week": 7 * day, "month": 30 * day, "year": 365 * day,
	}[strings.TrimSuffix(words[2], "s")]
	up := time.Duration(n) * unit
	if unit >= hour {
		up -= hour // hours are rounded, and longer units are made of hours
	}
	return up
}
