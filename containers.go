package main

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	docker "github.com/fsouza/go-dockerclient"
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
	id   string
	name string // without Docker's leading slash
	host string // the name of the host when the container was named
	naming
	// What the list said of it
	created int64  // Unix seconds
	image   string // what it was made of: see findImages
	status  string

	startedAt time.Time  // zero until it is known
	restarts  uint64     // by its restart policy
	checkedAt time.Time  // when the two were last known to be right, by our clock
	restarted bool       // whether it may have been started since then
	last      *cpuSample // nil if there is none to compare with
	trouble   string     // the last trouble with it that was logged, "" if it is well
	shadowed  string     // the name of the container that has its path, as logged
}

// census is what one list says of the running containers, and what the rules make of them.
type census struct {
	running    int
	asked      []*container   // those to ask
	collisions int            // those left out because another one has their path
	categories map[string]int // how many the rules put in each
}

// remember takes over a list made since start, and forgets all that is not in it. unnamed has
// errors by container id: such a container cannot be named yet, and is not asked.
func (cs *containers) remember(
	list []docker.APIContainers, unnamed map[string]error, host string, start time.Time,
) census {
	now := census{categories: map[string]int{}}
	byID := make(map[string]*container, len(list))
	for i := range list {
		listed := &list[i]
		name := containerName(listed.Names)
		if name == "" || byID[listed.ID] != nil {
			cs.log.Debug("list entry without a name, or there twice", "id", listed.ID)
			continue
		}
		known := cs.byID[listed.ID]
		if known == nil {
			known = &container{id: listed.ID, created: listed.Created}
		}
		byID[listed.ID] = known
		if err := unnamed[listed.ID]; err != nil {
			known.name, known.naming = name, naming{}
			cs.report(known, err)
			continue
		}
		if known.path == "" || known.name != name || known.host != host {
			known.name, known.host, known.image = name, host, listed.Image
			who := subject{name, listed.ID, listed.Image, listed.Labels}
			known.naming = cs.rules.apply(who, host)
		}
		if known.category != "" {
			now.categories[known.category]++
		}
		known.status = listed.Status
		known.restarted = known.mayHaveRestarted(start)
	}
	cs.byID, now.running = byID, len(byID)
	cs.share(&now)
	return now
}

// mayHaveRestarted reports whether the container may have been started since it was checked: if
// so, it is up for no longer than that.
func (known *container) mayHaveRestarted(start time.Time) bool {
	since := start.Round(0).Sub(known.checkedAt.Round(0)) // by the wall clock, as the engine's
	return known.startedAt.IsZero() || upAtLeast(known.status) < since+2*time.Second
}

// flatten adds what is known of a container beside its stats.
func (known *container) flatten(f *flattener, start time.Time) {
	if !known.startedAt.IsZero() {
		up := max(start.Sub(known.startedAt), 0) // the engine's clock can be ahead of ours
		f.addCount(".uptime", int(up/time.Second))
	}
	f.add(".restarts", counted(known.restarts))
	switch {
	case strings.Contains(known.status, "(healthy)"):
		f.addCount(".health", 1)
	case strings.Contains(known.status, "(unhealthy)"):
		f.addCount(".health", 0)
	}
}

// share gives each path to one container: to the one that has it already, else to the oldest.
func (cs *containers) share(now *census) {
	all := slices.SortedFunc(maps.Values(cs.byID), func(a, b *container) int {
		return cmp.Or(cmp.Compare(a.created, b.created), cmp.Compare(a.id, b.id))
	})
	all = slices.DeleteFunc(all, func(known *container) bool {
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
}

// report logs what is wrong with a container, or that it is well again, if that is news.
func (cs *containers) report(known *container, err error) {
	trouble := errorText(err)
	if trouble == known.trouble {
		return
	}
	log := cs.log.With("container", known.name)
	switch {
	case err == nil && known.trouble != errStopped.Error():
		log.Info("container can be read again")
	case isGone(err):
		log.Info("container is gone", "reason", trouble)
	case err != nil:
		log.Error("container cannot be read", "error", trouble)
	}
	known.trouble = trouble
}

// imageID is what a list shows when the image's name means another image by now.
var imageID = regexp.MustCompile(`^(sha256:[0-9a-f]{64}|[0-9a-f]{12,64})$`)

// findImages puts the names of images into the list that are only known to inspect, since newer
// images have taken the names. It does so only if a rule looks at images. It returns errors by
// container id.
func (cs *containers) findImages(
	ctx context.Context, e *engine, list []docker.APIContainers,
) map[string]error {
	if !cs.rules.see("image") {
		return nil
	}
	var missing []*docker.APIContainers
	for i := range list {
		listed := &list[i]
		if known := cs.byID[listed.ID]; known != nil && known.image != "" {
			listed.Image = known.image
		} else if imageID.MatchString(listed.Image) {
			missing = append(missing, listed)
		}
	}
	var mu sync.Mutex // of failed
	failed := map[string]error{}
	calls := flow{limit: fewInFlight}
	calls.run(len(missing), func(i int) {
		listed := missing[i]
		now, err := e.inspect(ctx, listed.ID)
		switch {
		case err != nil:
			mu.Lock()
			defer mu.Unlock()
			failed[listed.ID] = fmt.Errorf("its image: %w", err)
		case now.Config != nil && now.Config.Image != "":
			listed.Image = now.Config.Image
		}
	})
	return failed
}

// containerName returns a container's name out of those in a list: old engines also list the
// aliases that links gave it, as /other/alias. It returns "" if there is none.
func containerName(names []string) string {
	for _, name := range names {
		name = strings.TrimPrefix(name, "/")
		if name != "" && !strings.Contains(name, "/") {
			return name
		}
	}
	return ""
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
