package main

import (
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
	alive      func() // called after each answer
	log        *slog.Logger

	size     int   // room for the metrics of a sweep: those of the last one, and an eighth
	flow     flow  // of the calls to the engine
	about    about // what the engine says about itself
	answered bool  // whether the engine answered last time
	news     news  // what was last logged of the engine
}

type about struct {
	info
	server   string    // what it calls itself
	stopped  count     // containers
	askedAt  time.Time // zero: never
	nameless bool      // whether it will not tell its name
	news     news
	call     chan infoAnswer // gets the answer to the call that is under way, nil if none is
}

type infoAnswer struct {
	info
	err error
}

func newCollector(e *engine, rs rules, log *slog.Logger) *collector {
	return &collector{
		engine: e, containers: containers{rules: rs, log: log}, events: events{log: log}, log: log,
		alive: func() {},
	}
}

// configure sets what is not necessary. concurrency is 0 to adapt to the engine.
func (c *collector) configure(per details, host string, concurrency int) {
	c.per, c.host, c.flow = per, host, flow{limit: concurrency}
}

// onAnswer sets what is called after each answer about a container.
func (c *collector) onAnswer(alive func()) { c.alive = alive }

// sweepResult is what one sweep brought. All its metrics are of the time at which it began.
type sweepResult struct {
	start   time.Time
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

// errNoClock is why there are no polls: points of such a time would be in no graph.
var errNoClock = errors.New("the clock of this host is not set")

// sweep lists the running containers, asks all of them side by side, and returns their metrics
// and the host's. A container that fails costs the others nothing. Trouble is logged once, until
// it is over.
func (c *collector) sweep(ctx context.Context) sweepResult {
	result := sweepResult{start: time.Now()}
	if result.start.Before(noClock) {
		result.err = errNoClock
		if c.news.isNew(result.err.Error()) {
			c.log.Error("not polling: "+result.err.Error(), "now", inUTC(result.start.Unix()))
		}
		return result
	}
	found, err := c.survey(ctx)
	if err != nil {
		c.takeInfo(c.engine.timeout)
		c.engineFailed(ctx, err)
		result.err = err
		return result
	}
	errs := c.sampleAll(ctx, found, &result)
	c.takeInfo(c.engine.timeout)
	result.running = found.running
	result.err = c.engineTrouble(ctx, errs)
	for i, known := range found.asked {
		c.judge(ctx, &result, known, errs[i])
	}
	for _, known := range found.left {
		c.judge(ctx, &result, known, known.err)
	}
	if ctx.Err() == nil { // a sweep that was cut short says nothing about the host
		c.addHost(&result, found)
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
	isNew := !c.answered || c.engine.changed.Load()
	if isNew {
		server, err := c.engine.hello(ctx)
		if err != nil {
			return nil, err
		}
		c.about.server = server
	}
	isOld := time.Since(c.about.askedAt) > refresh
	if isNew || isOld || c.hostName() == "" {
		c.askInfo(sweep)
	}
	if isNew || c.hostName() == "" && c.containers.rules.needHost() {
		c.takeInfo(limit / 2)
	}
	all := c.about.stopped.n <= manyStopped || isOld
	list, at, err := c.engine.list(ctx, all)
	if err != nil {
		return nil, err
	}
	everything := len(list)
	list = slices.DeleteFunc(list, func(l listed) bool { return !l.runs() })
	c.answered = true
	if server := c.about.server; c.news.isNew("it is " + server + c.engine.api) {
		c.log.Info("Docker engine answers", "engine", server, "api", c.engine.api,
			"one_shot", c.engine.oneShot, "host", c.hostName(), "running", len(list))
	}
	c.containers.remember(list)
	fresh := c.events.poll(ctx, c.engine, at)
	c.findImages(ctx)
	c.containers.apply(c.hostName())
	found := c.containers.share()
	found.at = at
	if c.events.isKnown {
		c.containers.learnEvents(fresh, found, c.hostName())
	}
	if all { // those that wait to be restarted are stopped, for /info
		c.about.stopped = counted(uint64(everything - len(list) + found.restarting))
	}
	return found, nil
}

// askInfo begins to ask the engine about itself, beside everything else: it is the call that hangs
// most often, because of a plugin.
func (c *collector) askInfo(ctx context.Context) {
	if c.about.call != nil { // it is under way
		return
	}
	call := make(chan infoAnswer, 1)
	c.about.call = call
	go func() {
		i, err := c.engine.info(ctx)
		call <- infoAnswer{i, err}
	}()
}

// takeInfo takes over what the engine says about itself, if it was asked and answers in time. A
// proxy before the engine may forbid the question: the sweep goes on all the same.
func (c *collector) takeInfo(within time.Duration) {
	if c.about.call == nil {
		return
	}
	var got infoAnswer
	select {
	case got = <-c.about.call:
	case <-time.After(within):
		return
	}
	c.about.call = nil
	if got.err == nil && (got.Name != "" || c.about.Name == "") { // what was told stays known
		c.about.info, c.about.askedAt = got.info, time.Now()
		if !got.Stopped.absent() {
			c.about.stopped = got.Stopped
		}
	}
	if got.err == nil || isRefusal(got.err) {
		c.about.nameless = c.about.Name == ""
	}
	c.reportInfo(got.err)
}

func (c *collector) reportInfo(err error) {
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

func (c *collector) findImages(ctx context.Context) {
	ctx, cancel := context.WithTimeoutCause(ctx, c.engine.timeout/4, noAnswer(c.engine.timeout/4))
	defer cancel()
	list := c.containers.imageless()
	c.flow.run(len(list), false, func(i int) {
		seen, err := c.engine.inspect(ctx, list[i].ID)
		list[i].learnImage(seen, err)
	})
}

func (c *collector) engineFailed(ctx context.Context, err error) {
	if ctx.Err() != nil {
		return // we are ending, not the engine
	}
	c.answered = false
	if text := errorText(err) + engineHint(err); c.news.isNew(text) {
		c.log.Error("Docker engine does not answer", "error", text)
	}
}

// sampleAll samples containers side by side, and adds their metrics to result. It returns an error
// or nil for each.
func (c *collector) sampleAll(ctx context.Context, found *census, result *sweepResult) []error {
	result.metrics = make([]metric, 0, c.size)
	errs := make([]error, len(found.asked))
	var (
		mu       sync.Mutex // of the metrics, and of what follows
		late     bool       // whether a call timed out
		answered int        // containers whose stats came
		waited   time.Duration
	)
	c.flow.run(len(found.asked), c.engine.inTicks, func(i int) {
		// All calls for a container share one limit: it must not hold up the next sweep.
		start, limit := time.Now(), c.engine.timeout
		ctx, cancel := context.WithTimeoutCause(ctx, limit, noAnswer(limit))
		defer cancel()
		known, b := found.asked[i], buffers.Get().(*buffer)
		defer b.keep()
		s := sampling{collector: c, known: known, now: found.at, flattener: flattener{
			metrics: b.metrics[:0], path: known.path, at: result.start.Unix(),
		}}
		err := s.sample(ctx, &b.body)
		b.metrics = s.metrics
		c.alive()
		errs[i] = err
		mu.Lock()
		defer mu.Unlock()
		result.metrics = append(result.metrics, b.metrics...)
		late = late || isTooSlow(err)
		if !s.answered.IsZero() {
			answered, waited = answered+1, waited+s.answered.Sub(start)
		}
	})
	c.flow.adapt(late, answered, waited, c.engine.timeout)
	for _, path := range found.ended {
		f := flattener{result.metrics, path, result.start.Unix()}
		c.containers.ends[path].flatten(&f)
		result.metrics = f.metrics
	}
	return errs
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

// judge counts whether a container was read, has failed or was left out. One that has just ended is
// none of these, but only once. It logs that, unless the sweep as a whole failed.
func (c *collector) judge(ctx context.Context, result *sweepResult, known *container, err error) {
	err = known.judge(err)
	switch {
	case err == nil, errors.Is(err, errRestarting):
		result.sampled++
	case errors.As(err, new(*collision)):
		result.collisions++
	case !errors.Is(err, errStopped) && ctx.Err() == nil:
		result.failed++
	}
	if result.err == nil {
		c.containers.report(known, err)
	}
}

func (c *collector) addHost(result *sweepResult, found *census) {
	host := flattener{result.metrics, c.hostName(), result.start.Unix()}
	if host.path == "" {
		return
	}
	host.addCount(".containers.total", result.running)
	for _, category := range c.containers.rules.categories() {
		host.addCount(".containers."+category, found.categories[category])
	}
	// As /info counts them
	host.addCount(".containers.running", found.running-found.paused-found.restarting)
	host.addCount(".containers.paused", found.paused)
	host.add(".containers.stopped", c.about.stopped)
	c.events.flatten(&host)
	host.addCount(".metrics.sampled", result.sampled)
	host.addCount(".metrics.failed", result.failed)
	host.addCount(".metrics.collisions", result.collisions)
	took := time.Since(result.start)
	host.add(".metrics.duration", counted(uint64(took))) // an int may have 32 bits
	result.metrics = host.metrics
}

type buffer struct {
	body    answer
	metrics []metric
}

var buffers = sync.Pool{New: func() any { return new(buffer) }}

// keep makes b ready for another sample, unless a large answer has made it large.
func (b *buffer) keep() {
	if cap(b.body.text) <= 64<<10 {
		buffers.Put(b)
	}
}

type sampling struct {
	*collector
	known    *container
	now      time.Time // the engine's
	answered time.Time // when its stats came, zero if they did not
	flattener
}

// sample asks for the container and collects its metrics. What is known beside its stats is sent
// also if these cannot be read. One that waits for its restart sends only .restarts.
func (s *sampling) sample(ctx context.Context, body *answer) error {
	known, start := s.known, time.Now()
	err := s.sampleStats(ctx, body)
	switch {
	case errors.Is(err, errStopped):
	case errors.Is(err, errRestarting):
		s.add(".restarts", known.restarts)
	default:
		if err != nil && !s.events.isKnown && known.checkedAt.Before(start) {
			known.forget() // it may have been restarted
		}
		known.flatten(&s.flattener, s.now)
	}
	if its := known.ends; its != nil && (!errors.Is(err, errStopped) || its.isAny()) {
		its.flatten(&s.flattener)
	}
	return err
}

// sampleStats collects what the container's stats tell. Their error may be that it does not run.
func (s *sampling) sampleStats(ctx context.Context, body *answer) error {
	known := s.known
	if known.state() == "restarting" {
		if err := s.inspect(ctx); err != nil {
			return err
		}
	}
	*body = answer{text: body.text[:0]}
	from, err := s.engine.stats(ctx, known.ID, body)
	if err != nil {
		return s.doubt(ctx, err)
	}
	stats, err := decodeStats(body.text)
	if err != nil {
		return s.doubt(ctx, err)
	}
	isWindows := from.windows || s.about.OSType == "windows"
	from = origin{isWindows, from.podman, s.about.NCPU.n, s.about.MemTotal.n}
	s.now, s.answered = *stats.Read, time.Now()
	stats.flatten(&s.flattener, from, s.per)
	if known.isStale(stats.CPU.Usage.Total, s.events.isKnown) {
		seen, err := s.engine.inspect(ctx, known.ID)
		if err != nil {
			known.forget()
			return fmt.Errorf("its uptime: %w", err)
		}
		known.learn(seen)
	}
	if percent, ok := known.percent(stats.cpuSample(known.startedAt, from)); ok {
		s.addDecimal(".cpu.percent", percent)
	}
	return nil
}

// ending is for how long an engine may say that a container runs whose process has ended.
const ending = 1500 * time.Millisecond

// doubt returns what is wrong with a container whose stats call failed with err: engines have many
// answers for one that does not run, and have the same for some that do.
func (s *sampling) doubt(ctx context.Context, err error) error {
	why := s.inspect(ctx)
	if why == nil && s.known.news.said == "" { // it was well at the last poll
		select {
		case <-time.After(min(ending, s.engine.timeout/2)):
			why = s.inspect(ctx)
		case <-ctx.Done():
		}
	}
	switch isOver := errors.Is(why, errStopped) || errors.Is(why, errRestarting); {
	case isOver:
		return why
	case errors.Is(err, errStopped): // so it seemed
		return cmp.Or(why, errors.New("its stats answer is empty"))
	}
	return err
}

// inspect asks what only inspect tells. It returns nil if the container runs.
func (s *sampling) inspect(ctx context.Context) error {
	seen, err := s.engine.inspect(ctx, s.known.ID)
	if err != nil {
		return err
	}
	s.known.learn(seen)
	switch {
	case seen.State.Restarting:
		return errRestarting
	case !seen.State.Running:
		return errStopped
	}
	return nil
}
