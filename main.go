// Command docker-stats-to-backstop feeds Graphite with the stats of a host's Docker
// containers, through Backstop.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"syscall"
	"time"
)

// finishWithin is how long deliveries may go on after SIGTERM or SIGINT.
const finishWithin = 10 * time.Second

func main() {
	// Answers are small and come one by one: handing them from CPU to CPU costs more than the work.
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(1)
	}
	opts, err := parseOptions(os.Args[1:])
	switch {
	case errors.Is(err, flag.ErrHelp):
		printAll(usage())
		return
	case err != nil:
		signal.Ignore(syscall.SIGPIPE) // the status is to be right also if nobody reads why
		text := err.Error()            // the user's own, and not cut
		fmt.Fprintf(os.Stderr, "%s: %s\n", program, fit(text, len(text)))
		os.Exit(64) // EX_USAGE of sysexits.h; a Go program that crashes exits with 2
	case opts.version:
		printAll(program + " " + version() + "\n")
		return
	}
	lines := newLogWriter(os.Stderr)
	go lines.run()
	logger := newLogger(lines, opts.logLevel())
	log.SetFlags(0)
	log.SetOutput(slog.NewLogLogger(logger.Handler(), slog.LevelDebug).Writer()) // net/http's
	err = run(opts, logger)
	lines.flush()
	if err != nil {
		os.Exit(1) // the log says why
	}
}

// printAll prints text to standard output, or ends the process if that fails.
func printAll(text string) {
	if _, err := fmt.Print(text); err != nil {
		fmt.Fprintln(os.Stderr, program+":", err)
		os.Exit(1)
	}
}

// version returns the version, Go's version and the commit of this build.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	text := info.Main.Version + " " + info.GoVersion
	for _, setting := range info.Settings {
		if setting.Key == "vcs.revision" {
			text += " " + setting.Value
		}
	}
	return text
}

// run does what opts ask for, until it is done or a signal stops it. Its error is in the log.
func run(opts *options, log *slog.Logger) error {
	signal.Ignore(syscall.SIGHUP) // outlive the terminal
	if opts.to.remote && !opts.check {
		signal.Ignore(syscall.SIGPIPE) // outlive the reader of the log
	}
	if opts.spool == "" && os.Getenv("GOGC")+os.Getenv("GOMEMLIMIT") == "" {
		debug.SetGCPercent(50) // what waits in memory takes little more than its limit
		debug.SetMemoryLimit(max(opts.spoolLimit, 64<<20) + 24<<20)
	}
	polling, sending, release := untilSignal()
	defer release()
	opts.warnOfVariables(log)
	opts.warnOfContext(log)
	if opts.check {
		return checkNames(polling, release, opts, log)
	}
	c := sampler(opts, log)
	p, err := newPipeline(opts, c, log)
	if err != nil {
		return err
	}
	if opts.once {
		return p.once(polling, sending)
	}
	if opts.prints {
		log.Info("metrics are only printed, as neither --backstop nor SRV_BACKSTOP is set")
	}
	p.daemon(polling, sending, opts.poll)
	return nil
}

// untilSignal returns a context for polling, which ends at SIGTERM or SIGINT, and one for sending,
// which ends finishWithin later. A second signal ends the process at once.
func untilSignal() (polling, sending context.Context, release func()) {
	polling, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	sending, abort := context.WithCancelCause(context.Background())
	context.AfterFunc(polling, func() {
		stop() // the next signal has its usual effect
		time.AfterFunc(finishWithin, func() {
			abort(fmt.Errorf("no answer within %s after the signal to stop", finishWithin))
		})
	})
	return polling, sending, func() {
		stop()
		abort(nil)
	}
}

// sampler returns the collector that opts ask for.
func sampler(opts *options, log *slog.Logger) *collector {
	c := newCollector(opts.engine, opts.rules, log)
	c.configure(opts.per, opts.host, opts.concurrency)
	return c
}

// checkNames prints the table of --check. It returns an error if a container has no name of its
// own. Once release is called, a signal ends the process: printing may take for ever.
func checkNames(ctx context.Context, release func(), opts *options, log *slog.Logger) error {
	quiet := sampler(opts, slog.New(slog.DiscardHandler)) // the table says everything
	table, ok, err := check(ctx, quiet)
	if err != nil {
		log.Error("Docker engine does not answer", "error", errorText(err)+engineHint(err))
		return err
	}
	release()
	if _, err := fmt.Print(table); err != nil {
		log.Error("cannot write to standard output", "error", errorText(err))
		return err
	}
	if !ok {
		return errors.New("not every container has its own name")
	}
	return nil
}

// pipeline takes metrics from the collector, through the queue, to the receiver.
type pipeline struct {
	collector *collector
	queue     *queue
	delivery  *delivery
	service   *service
	log       *slog.Logger
}

// newPipeline connects the parts. It fails if the spool cannot be used.
func newPipeline(opts *options, c *collector, log *slog.Logger) (*pipeline, error) {
	to := opts.to
	delivering := log.With("to", to.address)
	q := newQueue(opts.spoolLimit, delivering)
	if opts.spool != "" && to.remote {
		if err := q.useSpool(&spool{dir: opts.spool, log: log}); err != nil {
			log.Error("not started: cannot use the folder of --spool",
				"spool", opts.spool, "error", errorText(err))
			return nil, err
		}
	}
	s := newService(opts.poll, q)
	c.onAnswer(s.alive)
	d := newDelivery(to, q, s.update, delivering)
	return &pipeline{collector: c, queue: q, delivery: d, service: s, log: log}, nil
}

func (p *pipeline) sweep(ctx context.Context) sweepResult {
	result := p.collector.sweep(ctx)
	if host := p.collector.hostName(); host != "" && len(result.metrics) > 0 {
		result.metrics = append(result.metrics, p.queue.own(host, result.start)...)
	}
	if len(result.metrics) > 0 {
		p.queue.put(result.metrics)
	}
	took := time.Since(result.start)
	p.service.hasSwept(result, took)
	p.log.Debug("polled", "running", result.running, "failed", result.failed,
		"metrics", len(result.metrics), "took", took.Round(time.Millisecond))
	return result
}

// once polls and delivers once. It returns an error if any of that failed.
func (p *pipeline) once(polling, sending context.Context) error {
	result := p.sweep(polling)
	p.queue.close()
	if polling.Err() != nil {
		p.log.Error("stopped by a signal before all was polled")
	}
	err := p.await(p.deliver(sending), sending)
	if !p.delivery.to.remote && len(result.metrics) > 0 { // somebody tries it
		p.log.Warn("cpu.percent needs two polls, so --once has none: leave it out, with --poll=10s")
	}
	if n := result.failed + result.collisions; n > 0 {
		err = errors.Join(err, fmt.Errorf("%d containers have no metrics", n))
	}
	return errors.Join(result.err, err)
}

// daemon polls until polling ends, and delivers until everything is delivered or sending ends.
func (p *pipeline) daemon(polling, sending context.Context, every time.Duration) {
	attrs := []any{"version", version(), "to", p.delivery.to.address,
		"docker", p.collector.engine, "poll", every}
	if s := p.queue.spool; s != nil {
		attrs = append(attrs, "spool", s.dir)
	}
	p.log.Info("started", attrs...)
	p.service.ready()
	delivered := p.deliver(sending)
	poll(polling, func() schedule { return newSchedule(every, p.collector.hostName()) },
		func(ctx context.Context) { p.sweep(ctx) }, p.log)
	p.log.Info("ending")
	p.service.ending()
	p.queue.close()
	_ = p.await(delivered, sending) // the log says what was not delivered
}

// deliver begins to deliver. Its result comes when that has ended.
func (p *pipeline) deliver(sending context.Context) <-chan error {
	delivered := make(chan error, 1)
	go func() { delivered <- p.delivery.deliver(sending) }()
	return delivered
}

// await waits until everything is delivered, or sending has ended and the disk had its time.
func (p *pipeline) await(delivered <-chan error, sending context.Context) error {
	select {
	case err := <-delivered:
		return err
	case <-sending.Done():
	}
	// No context ends a write to standard output that nobody reads.
	select {
	case err := <-delivered:
		return err
	case <-time.After(storeWait + time.Second):
		err := context.Cause(sending)
		kept, lost, _ := p.queue.left()
		p.delivery.logLeft(kept, lost, errorText(err))
		return err
	}
}
