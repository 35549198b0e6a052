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
	call     *infoCall // under way, nil if none is
}

// infoCall asks an engine about itself, beside everything else: it is the call that hangs most
// often, because of a plugin.
type infoCall struct {
	done chan struct{} // closed when the rest is there
	info info
	err  error
}

func newCollector(e *engine, rs rules, log *slog.Logger) *collector {
	return &collector{
		engine: e, containers: containers{rules: rs, log: log}, events: events{log: log}, log: log,
		flow: flow{most: maxConnections()},
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
func (c *collector) sweep(ctx context.Context) sweepResult {
	start := time.Now()
	now, err := c.survey(ctx)
	if err != nil {
		c.hear(c.engine.timeout)
		c.engineFailed(ctx, err)
		return sweepResult{err: err}
	}
	metrics, asked, errs := c.askAll(ctx, now, start)
	c.hear(c.engine.timeout)
	result := sweepResult{metrics: metrics, running: now.running, failed: len(now.unnamed),
		collisions: now.collisions}
	result.err = c.engineTrouble(ctx, errs)
	c.judge(ctx, &result, asked, errs)
	if ctx.Err() == nil { // a sweep that was cut short says nothing about the host
		c.addHost(&result, now, start)
		c.size = len(result.metrics) + len(result.metrics)/8
	}
	return result
}

// manyStopped is up to how many stopped containers each poll lists and counts them: one costs the
// engine about 0.1 ms. Above that, /info tells their number every ten minutes.
const manyStopped = 200

// survey lists the engine's containers, gives names to those that run, and asks what happened since
// the last time. An engine that is new, failed last time or was upgraded is first asked what it is.
func (c *collector) survey(ctx context.Context) (*census, error) {
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
		c.ask(ctx)
	}
	if fresh || c.hostName() == "" && c.containers.rules.needHost() {
		c.hear(c.engine.timeout / 2)
	}
	all := c.about.Stopped.n <= manyStopped || isOld
	list, err := c.engine.list(ctx, all)
	if err != nil {
		return nil, err
	}
	now, everything := time.Now(), len(list)
	list = slices.DeleteFunc(list, func(l listed) bool { return !l.runs() })
	if c.answered = true; c.news.isNew("it is " + c.server + c.engine.api) {
		c.log.Info("Docker engine answers", "engine", c.server, "api", c.engine.api,
			"one_shot", c.engine.oneShot, "host", c.hostName(), "running", len(list))
	}
	c.compareClocks()
	c.containers.changed(c.events.poll(ctx, c.engine))
	seen := c.containers.remember(list, c.hostName(), c.engine.clock.at(now))
	if all { // those that wait to be restarted are stopped, for /info
		c.about.Stopped = counted(uint64(everything - len(list) + seen.restarting))
	}
	return seen, nil
}

// ask begins to ask the engine about itself, unless that is under way.
func (c *collector) ask(ctx context.Context) {
	if c.about.call != nil {
		return
	}
	call := &infoCall{done: make(chan struct{})}
	c.about.call = call
	go func() {
		defer close(call.done)
		call.info, call.err = c.engine.info(ctx)
	}()
}

// hear takes over what the engine says about itself, if it was asked and answers in time. A proxy
// before the engine may forbid the question: the sweep goes on all the same.
func (c *collector) hear(within time.Duration) {
	call := c.about.call
	if call == nil {
		return
	}
	select {
	case <-call.done:
	case <-time.After(within):
		return
	}
	c.about.call = nil
	err := call.err
	if err == nil {
		if call.info.Stopped.absent() {
			call.info.Stopped = c.about.Stopped
		}
		call.info.Name = cmp.Or(call.info.Name, c.about.Name)
		c.about.info, c.about.askedAt = call.info, time.Now()
	}
	if err == nil || isRefusal(err) {
		c.about.nameless = err != nil || call.info.Name == ""
	}
	text := errorText(err)
	if errors.Is(err, context.Canceled) || !c.about.news.isNew(text) {
		return
	}
	switch {
	case isRefusal(err):
		c.log.Warn("Docker engine refuses /info, so this may not be its host's name; "+
			"set it with --host", "host", c.hostName(), "error", text)
	case err != nil && c.hostName() == "":
		c.log.Warn("Docker engine does not answer /info, retrying at the next poll; until then "+
			"there are no metrics of the host, and of containers with ${host} in their rule; "+
			"or set the name with --host", "error", text)
	case err != nil:
		c.log.Warn("Docker engine does not answer /info, retrying at the next poll", "error", text)
	}
}

// origin returns the host's CPUs and memory, as /info tells them.
func (c *collector) origin() origin {
	return origin{cpus: c.about.NCPU.n, memory: c.about.MemTotal.n}
}

// maxSkew is how far the engine's clock may be off ours without a warning.
const maxSkew = 30 * time.Second

// compareClocks warns of an engine whose clock differs from ours.
func (c *collector) compareClocks() {
	off, skewed := c.engine.clock.off(), ""
	if off.Abs() > maxSkew {
		skewed = "skewed"
	}
	if c.skew.isNew(skewed) && skewed != "" {
		c.log.Warn("Docker engine's clock differs from this host's, metrics have the engine's time",
			"ahead", off.Round(time.Second))
	}
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

// askAll samples the containers side by side. It returns the metrics of those that have a path for
// themselves, the containers that were asked, and an error or nil for each of these.
func (c *collector) askAll(ctx context.Context, now *census, start time.Time) (
	metrics []metric, asked []*container, errs []error,
) {
	named := len(now.asked)
	asked = slices.Clone(now.asked)
	for _, late := range now.imageless {
		asked = append(asked, late.container)
	}
	metrics = make([]metric, 0, c.size)
	ofLate := make([][]metric, len(now.imageless)) // another container may have their path
	errs = make([]error, len(asked))
	from, at := c.origin(), c.engine.clock.at(start)
	var mu sync.Mutex // of metrics
	if c.engine.inTicks {
		c.flow.inTicks()
	}
	c.flow.run(len(asked), func(i int) {
		// All calls for a container share one limit: it must not hold up the next sweep.
		limit := c.engine.timeout
		ctx, cancel := context.WithTimeoutCause(ctx, limit, noAnswer(limit))
		defer cancel()
		b := buffers.Get().(*buffer)
		defer b.release()
		s := sampling{c, asked[i], from, at, flattener{
			metrics: b.metrics[:0], path: asked[i].path, at: start.Unix(),
		}}
		if i >= named {
			errs[i] = s.name(ctx, now.imageless[i-named])
		}
		if errs[i] == nil && !s.known.drop {
			errs[i] = s.sample(ctx, &b.body)
		}
		b.metrics = s.metrics
		if c.alive != nil {
			c.alive()
		}
		if i >= named {
			ofLate[i-named] = slices.Clone(b.metrics)
			return
		}
		mu.Lock()
		defer mu.Unlock()
		metrics = append(metrics, b.metrics...)
	})
	if len(ofLate) > 0 {
		c.containers.share(now)
	}
	for i, late := range ofLate {
		if c.containers.holds(asked[named+i]) {
			metrics = append(metrics, late...)
		}
	}
	return metrics, asked, errs
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

// judge counts which containers were read and which failed. It logs that, unless the sweep as a
// whole failed.
func (c *collector) judge(
	ctx context.Context, result *sweepResult, asked []*container, errs []error,
) {
	for i, err := range errs {
		if known := asked[i]; known.path != "" && !c.containers.holds(known) {
			continue // left out, as its name has shown
		}
		switch {
		case err == nil, errors.Is(err, errRestarting):
			result.sampled++
		case !isGone(err) && ctx.Err() == nil:
			result.failed++
		}
		if result.err == nil {
			c.containers.report(asked[i], err)
		}
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

// maxPooled bounds what a buffer keeps, in bytes: a large answer arrives in another buffer each
// time, until all are large.
const maxPooled = 64 << 10

// release makes b free for another sample.
func (b *buffer) release() {
	if b.body.Cap() > maxPooled {
		b.body = bytes.Buffer{}
	}
	if cap(b.metrics) > maxPooled/64 { // 56 bytes each
		b.metrics = nil
	}
	buffers.Put(b)
}

// sampling makes the metrics of one container.
type sampling struct {
	*collector
	known *container
	from  origin
	now   time.Time // when the sweep began, by the engine's clock
	flattener
}

// name asks for the container's image and gives it the path that the rules make of that.
func (s *sampling) name(ctx context.Context, late *imageless) error {
	now, err := s.engine.inspect(ctx, s.known.id)
	if err != nil {
		return fmt.Errorf("its image: %w", err)
	}
	s.known.learn(now, s.now)
	late.who.image = cmp.Or(now.Config.Image, late.who.image)
	err = s.containers.apply(s.known, late.who, s.hostName())
	s.path = s.known.path
	return err
}

// sample asks for the container and collects its metrics. One that waits for its restart sends only
// .restarts.
func (s *sampling) sample(ctx context.Context, body *bytes.Buffer) error {
	if s.known.restarting {
		if err := s.inspect(ctx); err != nil {
			return err
		}
	}
	err := s.measure(ctx, body)
	if !isDoubtful(err) {
		return err
	}
	now := s.lookAgain(ctx)
	switch {
	case isGone(now), errors.Is(now, errRestarting):
		return now
	case errors.Is(err, errStopped): // so it seemed
		err = rubbish{errors.New("its stats answer is empty")}
		if now != nil {
			err = rubbish{fmt.Errorf("%w, and inspect: %w", err, now)}
		}
	}
	return err
}

// ending is for how long an engine may say that a container runs whose process has ended.
const ending = 1500 * time.Millisecond

// lookAgain asks inspect whether a container runs that seems not to: several times, if it did at
// the last poll.
func (s *sampling) lookAgain(ctx context.Context) error {
	err := s.inspect(ctx)
	until := time.Now().Add(min(ending, s.engine.timeout/2))
	for err == nil && s.known.news.said == "" && time.Now().Before(until) {
		select {
		case <-time.After(ending / 10):
		case <-ctx.Done():
			return nil
		}
		err = s.inspect(ctx)
	}
	return err
}

// inspect asks what only inspect tells. It returns nil if the container runs. If it waits for its
// restart, .restarts is added.
func (s *sampling) inspect(ctx context.Context) error {
	now, err := s.engine.inspect(ctx, s.known.id)
	if err != nil {
		return err
	}
	s.known.learn(now, s.now)
	switch {
	case now.State.Restarting:
		s.add(".restarts", s.known.restarts)
		return errRestarting
	case !now.State.Running:
		return errStopped
	}
	return nil
}

// measure asks for the container's stats.
func (s *sampling) measure(ctx context.Context, body *bytes.Buffer) error {
	known, start := s.known, s.at
	body.Reset()
	from, err := s.engine.stats(ctx, known.id, body)
	if err != nil {
		return err
	}
	stats, err := decodeStats(body.Bytes())
	if err != nil {
		return err
	}
	from.cpus, from.memory = s.from.cpus, s.from.memory
	stats.flatten(&s.flattener, known.path, from, s.per)
	if known.stale {
		now, err := s.engine.inspect(ctx, known.id)
		if err != nil {
			known.last = nil // nobody knows whether it was restarted
			return noUptime{err}
		}
		known.learn(now, s.now)
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
