package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"
)

// collector makes metrics of what the engine says about its containers. Only one goroutine may
// call its methods.
type collector struct {
	engine     *engine
	containers containers
	events     events
	per        details
	host       string // what --host says
	alive      func() // called after each answer; may be nil
	log        *slog.Logger

	size     int    // room for the metrics of a sweep: those of the last one, and an eighth
	flow     flow   // of the calls to the engine
	about    about  // what the engine says about itself
	answered bool   // whether the engine answered last time
	server   string // what the engine calls itself
	news     news   // what was last logged of the engine
	skew     news   // the same of its clock
}

// about is what an engine said about itself.
type about struct {
	info
	askedAt  time.Time // zero: never
	nameless bool      // whether it will not tell its name
	news     news
	call     chan aboutNow // gets the answer to the call that is under way, nil if none is
}

type aboutNow struct {
	info
	err error
}

func newCollector(e *engine, rs rules, log *slog.Logger) *collector {
	return &collector{
		engine: e, containers: containers{rules: rs, log: log}, events: events{log: log}, log: log,
	}
}

// sweepResult is what one sweep brought.
type sweepResult struct {
	metrics []metric
	running int   // containers
	sampled int   // containers that were read
	failed  int   // containers that could not be read
	err     error // why the engine as a whole could not be asked

	collisions int // containers that were left out: another one has their path
}

// hostName is the name of the host in its metrics, one node of a path: what --host says, else the
// engine's own name, else, if the engine will not tell that, this machine's. It is "" as long as it
// is not known: series under a name that changes soon would stay for ever.
func (c *collector) hostName() string {
	name := cmp.Or(c.host, c.about.Name)
	if name == "" && c.about.nameless {
		name, _ = os.Hostname()
	}
	return graphiteNode(name)
}

// sweep lists the running containers, asks all of them side by side, and returns their metrics
// and the host's. A container that fails costs the others nothing. Trouble is logged once, until
// it is over.
func (c *collector) sweep(ctx context.Context) (result sweepResult) {
	start := time.Now()
	now, err := c.survey(ctx)
	if err != nil {
		c.hear(c.engine.timeout)
		c.engineFailed(ctx, err)
		return sweepResult{err: err}
	}
	metrics, errs := c.askAll(ctx, now.asked, start)
	c.hear(c.engine.timeout)
	result = sweepResult{metrics: metrics, running: now.running, collisions: now.collisions}
	result.err = c.engineTrouble(ctx, errs)
	for i, known := range now.asked {
		c.judge(ctx, &result, known, errs[i])
	}
	for _, known := range now.unnamed {
		c.judge(ctx, &result, known, known.err)
	}
	if ctx.Err() == nil { // a sweep that was cut short says nothing about the host
		c.addHost(&result, now, start)
		c.size = len(result.metrics) + len(result.metrics)/8
	}
	return result
}

// manyStopped is up to how many stopped containers each poll lists and counts them: one costs the
// engine about 0.1 ms. Above that, /info tells their number every ten minutes.
const manyStopped = 200

// survey lists the engine's containers, asks what happened since the last time, and names those
// that run. An engine that is new, failed last time or was upgraded is first asked what it is.
func (c *collector) survey(sweep context.Context) (*census, error) {
	// All calls here share one limit: an engine that hangs must not hold up the next sweep.
	limit := c.engine.timeout
	ctx, cancel := context.WithTimeoutCause(sweep, limit, noAnswer(limit))
	defer cancel()
	fresh := !c.answered || c.engine.changed.Load()
	if fresh {
		server, err := c.engine.hello(ctx)
		if err != nil {
			return nil, err
		}
		c.server = server
	}
	isOld := time.Since(c.about.askedAt) > refresh
	if fresh || isOld || c.hostName() == "" {
		c.ask(sweep)
	}
	if fresh || c.hostName() == "" && c.containers.rules.needHost() {
		c.hear(c.engine.timeout / 2)
	}
	all := c.about.Stopped.n <= manyStopped || isOld
	list, at, err := c.engine.list(ctx, all)
	if err != nil {
		return nil, err
	}
	everything := len(list)
	list = slices.DeleteFunc(list, func(l listed) bool { return !l.runs() })
	if c.answered = true; c.news.isNew("it is " + c.server + c.engine.api) {
		c.log.Info("Docker engine answers", "engine", c.server, "api", c.engine.api,
			"one_shot", c.engine.oneShot, "host", c.hostName(), "running", len(list))
	}
	c.compareClocks(at)
	c.containers.remember(list)
	c.containers.changed(c.events.poll(ctx, c.engine, at))
	c.findImages(ctx)
	c.containers.apply(c.hostName())
	now := c.containers.share()
	if all { // those that wait to be restarted are stopped, for /info
		c.about.Stopped = counted(uint64(everything - len(list) + now.restarting))
	}
	return now, nil
}

// ask begins to ask the engine about itself, beside everything else: it is the call that hangs most
// often, because of a plugin.
func (c *collector) ask(ctx context.Context) {
	if c.about.call != nil { // it is under way
		return
	}
	call := make(chan aboutNow, 1)
	c.about.call = call
	go func() {
		i, err := c.engine.info(ctx)
		call <- aboutNow{i, err}
	}()
}

// hear takes over what the engine says about itself, if it was asked and answers in time. A proxy
// before the engine may forbid the question: the sweep goes on all the same.
func (c *collector) hear(within time.Duration) {
	if c.about.call == nil {
		return
	}
	var now aboutNow
	select {
	case now = <-c.about.call:
	case <-time.After(within):
		return
	}
	c.about.call = nil
	if now.err == nil {
		if now.Stopped.absent() {
			now.Stopped = c.about.Stopped
		}
		now.Name = cmp.Or(now.Name, c.about.Name)
		c.about.info, c.about.askedAt = now.info, time.Now()
	}
	if now.err == nil || isRefusal(now.err) {
		c.about.nameless = now.Name == ""
	}
	text := errorText(now.err)
	if errors.Is(now.err, context.Canceled) || !c.about.news.isNew(text) {
		return
	}
	switch {
	case isRefusal(now.err):
		c.log.Warn("Docker engine refuses /info, so this may not be its host's name; "+
			"set it with --host", "host", c.hostName(), "error", text)
	case now.err != nil && c.hostName() == "":
		c.log.Warn("Docker engine does not answer /info, retrying at the next poll; until then "+
			"there are no metrics of the host, and of containers with ${host} in their rule; "+
			"or set the name with --host", "error", text)
	case now.err != nil:
		c.log.Warn("Docker engine does not answer /info, retrying at the next poll", "error", text)
	}
}

// maxSkew is how far the engine's clock may be off ours without a warning.
const maxSkew = 30 * time.Second

// compareClocks warns of an engine whose clock differs from ours. at is its time, without the
// fraction of the second.
func (c *collector) compareClocks(at time.Time) {
	off, skewed := time.Until(at.Add(time.Second/2)), ""
	if off.Abs() > maxSkew {
		skewed = "skewed"
	}
	if c.skew.isNew(skewed) && skewed != "" {
		c.log.Warn("Docker engine's clock differs from this host's, metrics have the engine's time",
			"ahead", off.Round(time.Second))
	}
}

// findImages asks inspect for the images that only it knows.
func (c *collector) findImages(ctx context.Context) {
	ctx, cancel := context.WithTimeoutCause(ctx, c.engine.timeout/4, noAnswer(c.engine.timeout/4))
	defer cancel()
	list := c.containers.imageless()
	c.flow.run(len(list), func(i int) {
		known := list[i]
		if now, err := c.engine.inspect(ctx, known.ID); err != nil {
			known.err = fmt.Errorf("its image: %w", err)
		} else {
			known.learn(now)
			known.madeOf = cmp.Or(now.Config.Image, known.Image)
		}
	})
}

// engineFailed logs what is wrong with the engine, if that is news.
func (c *collector) engineFailed(ctx context.Context, err error) {
	if ctx.Err() != nil {
		return // we are ending, not the engine
	}
	c.answered = false
	if text := errorText(err) + engineHint(err); c.news.isNew(text) {
		c.log.Error("Docker engine does not answer", "error", text)
	}
}

// askAll samples containers side by side. It returns their metrics, and an error or nil for each.
func (c *collector) askAll(ctx context.Context, asked []*container, start time.Time) (
	metrics []metric, errs []error,
) {
	metrics = make([]metric, 0, c.size)
	errs = make([]error, len(asked))
	var mu sync.Mutex // of metrics
	c.flow.inTicks = c.engine.inTicks
	c.flow.run(len(asked), func(i int) {
		// All calls for a container share one limit: it must not hold up the next sweep.
		limit := c.engine.timeout
		ctx, cancel := context.WithTimeoutCause(ctx, limit, noAnswer(limit))
		defer cancel()
		b := buffers.Get().(*buffer)
		defer buffers.Put(b)
		s := sampling{c, asked[i], flattener{
			metrics: b.metrics[:0], path: asked[i].path, at: start.Unix(),
		}}
		errs[i] = s.sample(ctx, &b.body)
		b.metrics = s.metrics
		if c.alive != nil {
			c.alive()
		}
		mu.Lock()
		defer mu.Unlock()
		metrics = append(metrics, b.metrics...)
	})
	return metrics, errs
}

// engineTrouble returns why the sweep as a whole failed, or nil. Where a connection failed, it
// asks whether the engine is still there.
func (c *collector) engineTrouble(ctx context.Context, errs []error) error {
	if ctx.Err() != nil || !slices.ContainsFunc(errs, isConnectionError) {
		return context.Cause(ctx)
	}
	_, err := c.engine.hello(ctx)
	if err != nil {
		c.engineFailed(ctx, err)
	}
	return err
}

// judge counts whether a container was read or has failed. It logs that, unless the sweep as a
// whole failed.
func (c *collector) judge(ctx context.Context, result *sweepResult, known *container, err error) {
	switch {
	case err == nil, errors.Is(err, errRestarting):
		result.sampled++
	case !errors.Is(err, errStopped) && ctx.Err() == nil:
		result.failed++
	}
	if result.err == nil {
		c.containers.report(known, err)
	}
}

// addHost adds the metrics of the host and of the sweep itself.
func (c *collector) addHost(result *sweepResult, now *census, start time.Time) {
	host := flattener{metrics: result.metrics, path: c.hostName(), at: start.Unix()}
	if host.path == "" {
		return
	}
	host.addCount(".containers.total", result.running)
	for _, category := range c.containers.rules.categories() {
		host.addCount(".containers."+category, now.categories[category])
	}
	// As /info counts them
	host.addCount(".containers.running", now.running-now.paused-now.restarting)
	host.addCount(".containers.paused", now.paused)
	host.add(".containers.stopped", c.about.Stopped)
	c.events.flatten(&host)
	host.addCount(".metrics.sampled", result.sampled)
	host.addCount(".metrics.failed", result.failed)
	host.addCount(".metrics.collisions", now.collisions)
	host.add(".metrics.duration", counted(uint64(time.Since(start)))) // an int may have 32 bits
	result.metrics = host.metrics
}

// buffer holds one sample while it is made.
type buffer struct {
	body    bytes.Buffer
	metrics []metric
}

var buffers = sync.Pool{New: func() any { return new(buffer) }}

// sampling makes the metrics of one container.
type sampling struct {
	*collector
	known *container
	flattener
}

// sample asks for the container and collects its metrics. One that waits for its restart sends only
// .restarts.
func (s *sampling) sample(ctx context.Context, body *bytes.Buffer) error {
	known, start := s.known, s.at
	if known.state() == "restarting" {
		if err := s.inspect(ctx); err != nil {
			return err
		}
	}
	stats, from, err := s.read(ctx, body)
	switch {
	case isDoubtful(err):
		return s.doubt(ctx, err)
	case err != nil:
		return err
	}
	stats.flatten(&s.flattener, known.path, from, s.per)
	if known.isStale(stats.CPU.Usage.Total) {
		now, err := s.engine.inspect(ctx, known.ID)
		if err != nil {
			known.last = nil // nobody knows whether it was restarted
			return fmt.Errorf("its uptime: %w", err)
		}
		known.learn(now)
	}
	sample := stats.cpuSample(known.startedAt, from)
	if percent, ok := sample.percentSince(known.last); ok {
		s.addDecimal(".cpu.percent", percent)
	}
	known.last = sample
	s.at = start // what follows is not of the stats answer
	known.flatten(&s.flattener, *stats.Read)
	return nil
}

// read asks for the container's stats.
func (s *sampling) read(ctx context.Context, body *bytes.Buffer) (*stats, origin, error) {
	body.Reset()
	from, err := s.engine.stats(ctx, s.known.ID, body)
	if err != nil {
		return nil, from, err
	}
	from.cpus, from.memory = s.about.NCPU.n, s.about.MemTotal.n
	stats, err := decodeStats(body.Bytes())
	return stats, from, err
}

// ending is for how long an engine may say that a container runs whose process has ended.
const ending = 1500 * time.Millisecond

// doubt returns what is wrong with a container whose stats call failed with err, as it does for one
// that does not run.
func (s *sampling) doubt(ctx context.Context, err error) error {
	now := s.inspect(ctx)
	if now == nil && s.known.news.said == "" { // it was well at the last poll
		select {
		case <-time.After(min(ending, s.engine.timeout/2)):
			now = s.inspect(ctx)
		case <-ctx.Done():
		}
	}
	switch {
	case now != nil:
		return now
	case errors.Is(err, errStopped): // so it seemed
		return errors.New("its stats answer is empty")
	}
	return err
}

// inspect asks what only inspect tells. It returns nil if the container runs. If it waits for its
// restart, .restarts is added.
func (s *sampling) inspect(ctx context.Context) error {
	now, err := s.engine.inspect(ctx, s.known.ID)
	if err != nil {
		return err
	}
	s.known.learn(now)
	switch {
	case now.State.Restarting:
		s.add(".restarts", s.known.restarts)
		return errRestarting
	case !now.State.Running:
		return errStopped
	}
	return nil
}
