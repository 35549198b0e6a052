package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"

	docker "github.com/fsouza/go-dockerclient"
)

// collector makes metrics of what the engine says about its containers. Only one goroutine may
// call its methods.
type collector struct {
	engine     *engine
	containers containers
	per        details
	host       string // what --host says
	alive      func() // called after each answer; may be nil
	log        *slog.Logger

	size        int    // of the last sweep, in metrics, and some more
	flow        flow   // of the calls to the engine
	engineName  string // the engine's own name, "" until it is known
	met         bool   // whether the engine answered last time
	trouble     string // the last trouble with the engine that was logged
	infoTrouble string // the last trouble with its /info that was logged
}

func newCollector(e *engine, rs rules, log *slog.Logger) *collector {
	return &collector{engine: e, containers: containers{rules: rs, log: log}, log: log}
}

// sweepResult is what one sweep brought.
type sweepResult struct {
	metrics []metric
	running int   // containers
	sampled int   // containers that were read
	failed  int   // containers that could not be read
	err     error // why the engine as a whole could not be asked
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

// sweep lists the running containers, asks all of them side by side, and returns their metrics
// and the host's. A container that fails costs the others nothing. Trouble is logged once, until
// it is over.
func (c *collector) sweep(ctx context.Context) sweepResult {
	start := time.Now()
	list, about, err := c.list(ctx)
	if err != nil {
		c.engineFailed(ctx, err)
		return sweepResult{err: err}
	}
	unnamed := c.containers.findImages(ctx, c.engine, list)
	now := c.containers.remember(list, unnamed, c.hostName(), start)

	var asking sync.WaitGroup
	if about == nil {
		asking.Go(func() { about = c.about(ctx) })
	}
	metrics, errs := c.askAll(ctx, now.asked, start)
	asking.Wait()

	result := sweepResult{metrics: metrics, running: now.running, failed: len(unnamed)}
	result.err = c.engineTrouble(ctx, errs)
	c.judge(ctx, &result, now.asked, errs)
	if ctx.Err() == nil { // a sweep that was cut short says nothing about the host
		c.addHost(&result, now, about, start)
		c.size = len(result.metrics) + len(result.metrics)/8
	}
	return result
}

// list returns the engine's running containers. An engine that is new, failed last time or was
// upgraded is first asked what it is, and about is the answer. Else about is nil.
func (c *collector) list(ctx context.Context) (
	list []docker.APIContainers, about *info, err error,
) {
	if c.met && !c.engine.changed.Load() {
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

// about returns what the engine tells about itself. A proxy before the engine may forbid the
// question: the answer is empty then, and the sweep goes on.
func (c *collector) about(ctx context.Context) *info {
	about, err := c.engine.info(ctx)
	if err == nil && about.Name != "" {
		c.engineName = about.Name
	}
	if isConnectionError(err) {
		return &about // the engine as a whole is in trouble, and that is logged elsewhere
	}
	if text := errorText(err); text != c.infoTrouble {
		c.infoTrouble = text
		if err != nil {
			c.log.Warn("the Docker engine does not tell about itself: "+
				"no figures of all its containers, and this machine's name "+
				"where it has not told its own; --host sets that",
				"host", c.hostName(), "error", text)
		}
	}
	return &about
}

// engineFailed logs what is wrong with the engine, if that is news.
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

// askAll samples the containers side by side. It returns all metrics, and an error or nil for
// each container.
func (c *collector) askAll(ctx context.Context, asked []*container, start time.Time) (
	metrics []metric, errs []error,
) {
	metrics = make([]metric, 0, c.size)
	errs = make([]error, len(asked))
	var mu sync.Mutex // of metrics
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

// judge counts which containers were read and which failed. It logs that, unless the sweep as a
// whole failed.
func (c *collector) judge(
	ctx context.Context, result *sweepResult, asked []*container, errs []error,
) {
	for i, err := range errs {
		switch {
		case err == nil:
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
func (c *collector) addHost(result *sweepResult, now census, about *info, start time.Time) {
	host := flattener{metrics: result.metrics, path: c.hostName(), at: start.Unix()}
	host.addCount(".containers.total", result.running)
	for _, category := range c.containers.rules.categories() {
		host.addCount(".containers."+category, now.categories[category])
	}
	host.add(".containers.running", about.Running)
	host.add(".containers.paused", about.Paused)
	host.add(".containers.stopped", about.Stopped)
	host.addCount(".metrics.sampled", result.sampled)
	host.addCount(".metrics.failed", result.failed)
	host.addCount(".metrics.collisions", now.collisions)
	host.addCount(".metrics.duration", int(time.Since(start)))
	result.metrics = host.metrics
}

// buffer holds one sample while it is made.
type buffer struct {
	body    bytes.Buffer
	metrics []metric
}

var buffers = sync.Pool{New: func() any { return new(buffer) }}

// sample asks for one container and leaves its metrics in b.
func (c *collector) sample(
	ctx context.Context, known *container, start time.Time, b *buffer,
) error {
	b.body.Reset()
	f := flattener{metrics: b.metrics[:0]}
	defer func() { b.metrics = f.metrics }()
	from, err := c.engine.stats(ctx, known.id, &b.body)
	if err != nil {
		if c.hasStopped(ctx, known.id, err) {
			return errStopped
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
			known.last = nil // nobody knows whether it was restarted
			return fmt.Errorf("its uptime: %w", err)
		}
		known.startedAt = now.State.StartedAt
		known.restarts = uint64(max(now.RestartCount, 0))
	}
	known.checkedAt = start
	sample := stats.cpuSample(known.startedAt, from)
	if percent, ok := sample.percentSince(known.last, from); ok {
		f.addDecimal(".cpu.percent", percent)
	}
	known.last = sample
	f.at = start.Unix() // what follows is not of the stats answer
	known.flatten(&f, start)
	return nil
}

// hasStopped reports whether a failed stats call means that the container has just stopped:
// engines with one-shot answer 500 then.
func (c *collector) hasStopped(ctx context.Context, id string, err error) bool {
	var status *docker.Error
	if !errors.As(err, &status) || status.Status < 500 {
		return false
	}
	now, err := c.engine.inspect(ctx, id)
	return isGone(err) || err == nil && !now.State.Running
}
