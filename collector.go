package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	docker "github.com/fsouza/go-dockerclient"
	"golang.org/x/sync/errgroup"
)

// collector makes metrics of what the engine says about its containers. Its methods are
// called by one goroutine.
type collector struct {
	engine *engine
	rules  rules
	per    details
	host   string // what --host says
	alive  func() // called after each answer; nil for nothing
	log    *slog.Logger

	size        int                   // of the last sweep, in metrics, and some more
	flow        flow                  // of the calls to the engine
	engineName  string                // the engine's own name, once it is known
	met         bool                  // whether the engine answers, as far as we know
	trouble     string                // the last trouble with the engine that was logged
	infoTrouble string                // the last trouble with its /info that was logged
	containers  map[string]*container // the running ones of the last list, by id
	holders     map[string]*container // of them, those whose metrics have a path, by that path
}

// container is what is kept of a running container from one sweep to the next.
type container struct {
	id   string
	name string // without Docker's leading slash
	host string // the name of the host when it was named
	naming
	// What the list said of it
	created int64  // Unix seconds
	image   string // but what it was made of: see findImages
	status  string

	startedAt time.Time  // zero until it is known
	restarts  uint64     // by its restart policy
	checkedAt time.Time  // when the two were last known to be right, by our clock
	restarted bool       // whether it may have been started since then
	last      *cpuSample // nil if there is none to compare with
	trouble   string     // the last trouble with it that was logged, "" since it is well
	shadowed  string     // the name of the one that has its path, as logged
}

// sweepResult is what one sweep brought.
type sweepResult struct {
	metrics []metric
	running int   // containers
	failed  int   // those of them that could not be read
	err     error // why the engine as a whole could not be asked, if it could not
}

// hostName is the name of the host in its metrics, one node of a path: what --host says,
// else the engine's own name, else, until that is known, this machine's.
func (c *collector) hostName() string {
	name := c.host
	if name == "" {
		name = c.engineName
	}
	if name == "" {
		name, _ = os.Hostname()
	}
	return graphiteNode(name)
}

// sweep lists the running containers, asks all of them side by side, and returns their
// metrics and the host's. What goes wrong with one of them takes nothing from the others.
// Trouble is logged once, until it is over.
func (c *collector) sweep(ctx context.Context) sweepResult {
	start := time.Now()
	list, about, err := c.list(ctx)
	if err != nil {
		c.engineFailed(ctx, err)
		return sweepResult{err: err}
	}
	unnamed := c.findImages(ctx, list)
	now := c.remember(list, unnamed, start)
	asked := now.asked

	metrics := make([]metric, 0, c.size)
	errs := make([]error, len(asked))
	var mu sync.Mutex // of metrics
	var group errgroup.Group
	if about == nil {
		group.Go(func() error {
			about = c.about(ctx)
			return nil
		})
	}
	c.flow.run(len(asked), func(i int) {
		b := buffers.Get().(*buffer)
		defer buffers.Put(b)
		errs[i] = c.sample(ctx, asked[i], start, b)
		if c.alive != nil {
			c.alive()
		}
		mu.Lock()
		defer mu.Unlock()
		metrics = append(metrics, b.metrics...)
	})
	group.Wait()

	result := sweepResult{metrics: metrics, running: len(c.containers), failed: len(unnamed), err: context.Cause(ctx)}
	// Where a connection failed, was it the container's or is the engine gone?
	if result.err == nil && slices.ContainsFunc(errs, isConnectionError) {
		if _, result.err = c.engine.hello(ctx); result.err != nil {
			c.engineFailed(ctx, result.err)
		}
	}
	sampled := 0
	for i, err := range errs {
		switch {
		case err == nil:
			sampled++
		case !isGone(err) && ctx.Err() == nil:
			result.failed++
		}
		if result.err == nil { // else it is no container's fault
			c.containerIs(asked[i], err)
		}
	}
	if ctx.Err() != nil {
		return result // one that was cut short says nothing about the host
	}
	host := flattener{path: c.hostName(), at: start.Unix()}
	host.addCount(".containers.total", result.running)
	for _, category := range c.rules.categories() {
		host.addCount(".containers."+category, now.categories[category])
	}
	host.add(".containers.running", about.Running)
	host.add(".containers.paused", about.Paused)
	host.add(".containers.stopped", about.Stopped)
	host.addCount(".metrics.sampled", sampled)
	host.addCount(".metrics.failed", result.failed)
	host.addCount(".metrics.collisions", now.collisions)
	host.addCount(".metrics.duration", int(time.Since(start)))
	result.metrics = append(result.metrics, host.metrics...)
	c.size = len(result.metrics) + len(result.metrics)/8
	return result
}

// list returns the engine's running containers. An engine that was not met before, or not
// since it failed, is first asked what it is, of which about is the answer; else it is nil.
func (c *collector) list(ctx context.Context) (list []docker.APIContainers, about *info, err error) {
	if c.met && !c.engine.changed.Load() { // else it was upgraded
		list, err = c.engine.list(ctx)
		return list, nil, err
	}
	server, err := c.engine.hello(ctx)
	if err != nil {
		return nil, nil, err
	}
	about = c.about(ctx)
	if list, err = c.engine.list(ctx); err != nil {
		return nil, nil, err
	}
	c.log.Info("Docker engine answers", "engine", server, "api", c.engine.api,
		"one_shot", c.engine.oneShot, "host", c.hostName(), "running", len(list))
	c.met, c.trouble = true, ""
	return list, about, nil
}

// about returns what the engine tells about itself: nothing, where it does not. A proxy
// before the engine may forbid the question, which is no reason to give up the rest.
func (c *collector) about(ctx context.Context) *info {
	about, err := c.engine.info(ctx)
	if err == nil && about.Name != "" {
		c.engineName = about.Name
	}
	if isConnectionError(err) {
		return &about // which is trouble of the engine as a whole
	}
	if text := errorText(err); text != c.infoTrouble {
		c.infoTrouble = text
		if err != nil {
			c.log.Warn("the Docker engine does not tell about itself: no figures of all its containers, and this machine's name where it has not told its own; --host sets that",
				"host", c.hostName(), "error", text)
		}
	}
	return &about
}

// engineFailed logs what is wrong with the engine, where that is news.
func (c *collector) engineFailed(ctx context.Context, err error) {
	if ctx.Err() != nil {
		return // we are ending, not the engine
	}
	c.met = false
	if text := errorText(err) + engineHint(err); text != c.trouble {
		c.trouble = text
		c.log.Error("Docker engine does not answer", "error", text)
	}
}

// containerIs logs what is wrong with a container, where that is news, or that it is well again.
func (c *collector) containerIs(known *container, err error) {
	trouble := errorText(err)
	if trouble == known.trouble {
		return
	}
	log := c.log.With("container", known.name)
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

// imageID is what a list has in place of an image's name when that means another image by now.
var imageID = regexp.MustCompile(`^(sha256:[0-9a-f]{64}|[0-9a-f]{12,64})$`)

// findImages puts into the list what its containers were made of, where a rule wants to see that: inspect alone knows, once a newer
// image has taken the name. It returns the errors, by the containers' ids.
func (c *collector) findImages(ctx context.Context, list []docker.APIContainers) map[string]error {
	if !c.rules.see("image") {
		return nil
	}
	var (
		group  errgroup.Group
		mu     sync.Mutex
		failed map[string]error
	)
	group.SetLimit(fewInFlight)
	for i := range list {
		listed := &list[i]
		if known := c.containers[listed.ID]; known != nil && known.image != "" {
			listed.Image = known.image
			continue
		}
		if !imageID.MatchString(listed.Image) {
			continue
		}
		group.Go(func() error {
			now, err := c.engine.inspect(ctx, listed.ID)
			if err == nil && now.Config != nil && now.Config.Image != "" {
				listed.Image = now.Config.Image
			}
			if err != nil {
				mu.Lock()
				defer mu.Unlock()
				if failed == nil {
					failed = map[string]error{}
				}
				failed[listed.ID] = fmt.Errorf("its image: %w", err)
			}
			return nil // one that failed must not end the others
		})
	}
	group.Wait()
	return failed
}

// census is what a list says of the running containers, and the rules make of them.
type census struct {
	asked      []*container   // those to ask
	collisions int            // those that another one's path keeps from that
	categories map[string]int // how many the rules put in each
}

// remember takes over a list made since start, and forgets all that is not in it. Those in unnamed, by their ids, cannot be named
// yet: their errors are logged, and they are not asked.
func (c *collector) remember(list []docker.APIContainers, unnamed map[string]error, start time.Time) census {
	now := census{categories: map[string]int{}}
	containers := make(map[string]*container, len(list))
	host := c.hostName()
	for _, listed := range list {
		name := containerName(listed.Names)
		if name == "" || containers[listed.ID] != nil {
			c.log.Debug("list entry without a name, or there twice", "id", listed.ID)
			continue
		}
		known := c.containers[listed.ID]
		if known == nil {
			known = &container{id: listed.ID, created: listed.Created}
		}
		containers[listed.ID] = known
		if err := unnamed[listed.ID]; err != nil {
			known.name, known.naming = name, naming{}
			c.containerIs(known, err)
			continue
		}
		if known.path == "" || known.name != name || known.host != host {
			known.name, known.host, known.image = name, host, listed.Image
			known.naming = c.rules.apply(subject{name, listed.ID, listed.Image, listed.Labels}, host)
		}
		if known.category != "" {
			now.categories[known.category]++
		}
		known.status = listed.Status
		// If it was started since checkedAt, it is not up for longer than that.
		known.restarted = known.startedAt.IsZero() || upAtLeast(listed.Status) < start.Round(0).Sub(known.checkedAt.Round(0))+2*time.Second
	}
	// Of those with one path, the one that has had it keeps it; at first, that is the oldest.
	all := slices.SortedFunc(maps.Values(containers), func(a, b *container) int {
		return cmp.Or(cmp.Compare(a.created, b.created), cmp.Compare(a.id, b.id))
	})
	all = slices.DeleteFunc(all, func(known *container) bool { return known.path == "" || known.drop })
	holders := make(map[string]*container, len(containers))
	for _, known := range all {
		if c.holders[known.path] == known {
			holders[known.path] = known
		}
	}
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
			c.log.Warn("container left out: another one has the same name in its metrics; --prefix can tell them apart",
				"container", known.name, "other", holder.name, "metrics", known.path)
		}
	}
	c.containers, c.holders = containers, holders
	return now
}

// containerName returns a container's name out of those in a list: old engines give the
// aliases that links gave it as well, as /other/alias. "" if there is none.
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
// "Up 2 hours (healthy)". Statuses that do not say are 0.
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
		up -= hour // hours are rounded, and the longer ones are made of them
	}
	return up
}

// buffer is what is needed for a sample, and not after it.
type buffer struct {
	body    bytes.Buffer
	metrics []metric
}

var buffers = sync.Pool{New: func() any { return new(buffer) }}

// sample asks for one container and leaves its metrics in b.
func (c *collector) sample(ctx context.Context, known *container, start time.Time, b *buffer) error {
	b.body.Reset()
	f := flattener{metrics: b.metrics[:0]}
	defer func() { b.metrics = f.metrics }()
	from, err := c.engine.stats(ctx, known.id, &b.body)
	if err != nil {
		var status *docker.Error
		if errors.As(err, &status) && status.Status >= 500 {
			// So say engines with one-shot of a container that has just stopped, too.
			if now, inspectErr := c.engine.inspect(ctx, known.id); isGone(inspectErr) || inspectErr == nil && !now.State.Running {
				return errStopped
			}
		}
		return err
	}
	stats, err := decodeStats(b.body.Bytes())
	if err != nil {
		return err
	}
	stats.flatten(&f, known.path, from, c.per)
	if known.restarted {
		now, err := c.engine.inspect(ctx, known.id)
		if err != nil {
			known.last = nil // since nobody knows whether it was restarted
			return fmt.Errorf("its uptime: %w", err)
		}
		known.startedAt, known.restarts = now.State.StartedAt, uint64(max(now.RestartCount, 0))
	}
	known.checkedAt = start
	sample := stats.cpuSample(known.startedAt, from)
	if percent, ok := sample.percentSince(known.last, from); ok {
		f.addDecimal(".cpu.percent", percent)
	}
	known.last = sample

	// What is not of the stats answer is of the sweep.
	f.at = start.Unix()
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
	return nil
}
