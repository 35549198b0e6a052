// Command docker-stats-to-backstop feeds Graphite with the stats of a host's Docker
// containers, through Backstop.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/journal"
	"github.com/docker/go-units"
	"github.com/peterbourgon/ff/v3"
)

const program = "docker-stats-to-backstop"

const usage = `Feeds Graphite with the stats of this host's Docker containers, through Backstop.

See what would be sent:

    docker-stats-to-backstop --once

Send it every minute:

    docker-stats-to-backstop --backstop=https://user:password@backstop.server/publish/docker

The same, with the metrics of my.container.name.x under my.name:

    docker-stats-to-backstop --backstop=https://user:password@backstop.server/publish/docker \
      --prefix='{"regexp":"(.*)\\..*\\.(.*)\\..*","into":"$1.$2"}' --poll=60s

Options; each can also be set by the environment variable beside it, or by a file that
the variable with _FILE behind its name leads to, such as
SRV_BACKSTOP_FILE=/run/secrets/backstop. The option wins over both, and an empty
variable counts as unset.

  --backstop=URL    SRV_BACKSTOP   where to send to: an http or https URL, with user:password@
                                   for Basic authentication; - prints the metrics as Carbon
                                   plaintext lines instead (default: -)
  --docker=URL      SRV_DOCKER     the Docker engine: unix:///path, tcp://host:port, http:// or
                                   https://, on Windows npipe:// too; DOCKER_TLS_VERIFY and
                                   DOCKER_CERT_PATH are read as the docker command reads them
                                   (default: $DOCKER_HOST, or else %s)
  --prefix=JSON     SRV_PREFIX     how a container's name becomes the prefix of its metrics:
                                   {"regexp":"…","into":"…"} replaces each match of the Go
                                   regular expression by "into", where $1 is its first group and
                                   ${host} this host's name; or a list of such rules, of which the
                                   first that matches counts; or @FILE, which has them. More keys:
                                   "from", "category", "drop", see the README; --check shows what
                                   comes out (default: the name as it is)
  --poll=DURATION   SRV_POLL       how often, such as 10s, 1m or 1m30s (default: 60s)
  --host=NAME       SRV_HOST       the prefix of this host's own metrics
                                   (default: the engine's name for its host)
  --per=LIST        SRV_PER        finer series as well: core, interface, device, or several of
                                   them with commas between (default: none)
  --spool=DIR       SRV_SPOOL      keep metrics in this folder until Backstop has them, so that they
                                   outlive a restart, a kill and a loss of power
                                   (default: $STATE_DIRECTORY, which systemd sets, or else none:
                                   they are kept in memory)
  --spool-limit=SIZE  SRV_SPOOL_LIMIT
                                   how much is kept at most, in either place; then the oldest are
                                   given up (default: 256MiB)
  --concurrency=N   SRV_CONCURRENCY
                                   how many calls to the engine may be under way at the same time
                                   (default: as many as it needs, up to 512)
  --check           SRV_CHECK      show what --prefix makes of each running container, and exit: 0, or
                                   1 if two would have one name; nothing is sent
  --once            SRV_ONCE       poll once, deliver, and exit: 0, or 1 if anything failed
  --verbose         SRV_VERBOSE    log every poll and delivery as well
  --version                        print the version and exit
  --help                           print this and exit
`

// finishWithin is how long deliveries may go on after SIGTERM or SIGINT.
const finishWithin = 10 * time.Second

// maxCall is how long one call to the engine may take, where the poll interval allows.
const maxCall = 10 * time.Second

// Bounds of --spool-limit, in bytes. The least of it holds a sweep of a thousand containers and more.
const (
	minSpool = 1 << 20
	maxSpool = 1 << 50
)

// maxConcurrency is the most that makes sense: an engine has not so many containers.
const maxConcurrency = 10_000

// options are those of the command line, checked.
type options struct {
	backstop    *backstop // nil: standard output
	engine      *engine
	rules       rules
	poll        time.Duration
	host        string
	per         details
	spool       string // the folder, absolute; "": in memory
	spoolLimit  int64  // bytes
	concurrency int    // 0: found out
	check       bool
	once        bool
	verbose     bool
	version     bool
}

func main() {
	// The work on an answer is small, and answers come one by one. To hand them over between CPUs costs more than that work.
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(1)
	}
	opts, err := parseOptions(os.Args[1:])
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Printf(usage, defaultDocker)
		return
	case err != nil:
		fmt.Fprintf(os.Stderr, "%s: %s\n", program, oneLine(err.Error()))
		os.Exit(2)
	case opts.version:
		fmt.Println(program, version())
		return
	}
	if err := run(opts, newLogger(os.Stderr, opts)); err != nil {
		os.Exit(1) // the log says why
	}
}

// parseOptions reads the options from args and from the environment. Its errors are one
// line and show no value that may hold a secret. For --help it returns flag.ErrHelp.
func parseOptions(args []string) (*options, error) {
	// All values are plain text for the flag package, and looked at below: its own error
	// texts repeat the value, which may be a URL with a password.
	var backstopURL, docker, prefix, poll, host, per, spool, spoolLimit, concurrency, check, once, verbose, version string
	flags := flag.NewFlagSet(program, flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.StringVar(&backstopURL, "backstop", "-", "")
	flags.StringVar(&docker, "docker", cmp.Or(os.Getenv("DOCKER_HOST"), defaultDocker), "")
	flags.StringVar(&prefix, "prefix", "", "")
	flags.StringVar(&poll, "poll", "60s", "")
	flags.StringVar(&host, "host", "", "")
	flags.StringVar(&per, "per", "", "")
	stateDirectory, _, _ := strings.Cut(os.Getenv("STATE_DIRECTORY"), ":") // systemd's StateDirectory=
	flags.StringVar(&spool, "spool", stateDirectory, "")
	flags.StringVar(&spoolLimit, "spool-limit", "256MiB", "")
	flags.StringVar(&concurrency, "concurrency", "", "")
	flags.BoolFunc("check", "", func(text string) error { check = text; return nil })
	flags.BoolFunc("once", "", func(text string) error { once = text; return nil })
	flags.BoolFunc("verbose", "", func(text string) error { verbose = text; return nil })
	flags.BoolFunc("version", "", func(text string) error { version = text; return nil })
	// ff would read a variable for --version as well, and SRV_VERSION may well be there for
	// something else.
	os.Unsetenv("SRV_VERSION")

	if err := flags.Parse(args); err != nil {
		return nil, explainFlag(err)
	}
	onLine := map[string]bool{}
	flags.Visit(func(f *flag.Flag) { onLine[f.Name] = true })
	inFile, noFile := readFiles(flags, onLine)
	if err := ff.Parse(flags, args, ff.WithEnvVarPrefix("SRV")); err != nil {
		return nil, explainFlag(err)
	}
	if flags.NArg() > 0 {
		stray := shown(flags.Arg(0))
		if strings.Contains(stray, ":") { // user:password, as likely as not
			stray = shown("@")
		}
		return nil, fmt.Errorf("unexpected argument %s: options are written --name=value; see --help", stray)
	}
	// Where a value came from, for the message that refuses it.
	from := func(name string) string {
		if onLine[name] {
			return "--" + name
		}
		if inFile[name] {
			return variableOf(name) + "_FILE"
		}
		if os.Getenv(variableOf(name)) != "" {
			return variableOf(name)
		}
		switch name {
		case "docker":
			return "DOCKER_HOST"
		case "spool":
			return "STATE_DIRECTORY"
		}
		return "--" + name
	}

	opts := &options{host: host}
	for _, name := range []string{"backstop", "docker", "prefix", "poll", "host", "per", "spool", "spool-limit", "concurrency"} {
		value := flags.Lookup(name).Value.String()
		if onLine[name] && value == "" {
			return nil, fmt.Errorf("--%s is empty: give it a value, or leave it out for the default; see --help", name)
		}
		if onLine[name] && strings.HasPrefix(value, "--") { // the next option, taken for its value
			return nil, fmt.Errorf("--%s needs a value: --%[1]s=VALUE; see --help", name)
		}
	}
	var err error
	for _, s := range []struct {
		name, text string
		on         *bool
	}{{"check", check, &opts.check}, {"once", once, &opts.once}, {"verbose", verbose, &opts.verbose}, {"version", version, &opts.version}} {
		if *s.on, err = strconv.ParseBool(cmp.Or(s.text, "false")); err != nil {
			return nil, fmt.Errorf("%s is on or off: it takes no other value than true or false", from(s.name))
		}
	}
	if opts.version {
		return opts, nil // whatever else is said
	}
	if noFile != nil {
		return nil, noFile
	}
	if backstopURL != "-" {
		if opts.backstop, err = newBackstop(backstopURL); err != nil {
			return nil, fmt.Errorf("%s: %w", from("backstop"), err)
		}
	}
	if opts.poll, err = time.ParseDuration(poll); err != nil {
		return nil, fmt.Errorf("%s: %s is not a duration; write one with its unit, such as 60s or 1m30s", from("poll"), shown(poll))
	}
	if opts.poll <= 0 {
		return nil, fmt.Errorf("%s: %s is not longer than 0; write a duration such as 60s", from("poll"), poll)
	}
	if prefix != "" {
		if opts.rules, err = parseRules(prefix); err != nil {
			return nil, fmt.Errorf("%s: %w", from("prefix"), err)
		}
	}
	if opts.per, err = parseDetails(per); err != nil {
		return nil, fmt.Errorf("%s: %w", from("per"), err)
	}
	if spool != "" {
		if strings.Contains(spool, "://") {
			return nil, fmt.Errorf("%s: %s is not the path of a folder", from("spool"), shown(spool))
		}
		if opts.spool, err = filepath.Abs(spool); err != nil {
			return nil, fmt.Errorf("%s: %w", from("spool"), err)
		}
		if trouble := spoolTrouble(opts.spool); trouble != "" {
			return nil, fmt.Errorf("%s: %s: %s", from("spool"), shown(spool), trouble)
		}
	}
	if opts.spoolLimit, err = units.RAMInBytes(spoolLimit); err != nil {
		return nil, fmt.Errorf("%s: %s is not a size; write one such as 256MiB, 512M or 1GiB", from("spool-limit"), shown(spoolLimit))
	}
	if opts.spoolLimit < minSpool || opts.spoolLimit > maxSpool {
		return nil, fmt.Errorf("%s: %s is not between 1MiB and 1PiB; write a size such as 256MiB", from("spool-limit"), shown(spoolLimit))
	}
	if concurrency != "" {
		if opts.concurrency, err = strconv.Atoi(concurrency); err != nil || opts.concurrency < 1 || opts.concurrency > maxConcurrency {
			return nil, fmt.Errorf("%s: %s is not a number from 1 to %d; leave it out for the default, which suits most engines",
				from("concurrency"), shown(concurrency), maxConcurrency)
		}
	}
	// A container that hangs must not cost the others their next poll.
	if opts.engine, err = newEngine(docker, min(maxCall, opts.poll-opts.poll/10)); err != nil {
		return nil, fmt.Errorf("%s: %w", from("docker"), err)
	}
	return opts, nil
}

// variableOf returns the environment variable for an option.
func variableOf(name string) string {
	return "SRV_" + strings.ToUpper(strings.ReplaceAll(name, "-", "_"))
}

// readFiles sets the options whose value is in a file, as Docker's secrets and systemd's credentials are, and which are not on the
// command line. It returns which ones.
func readFiles(flags *flag.FlagSet, onLine map[string]bool) (inFile map[string]bool, err error) {
	inFile = map[string]bool{}
	flags.VisitAll(func(f *flag.Flag) {
		variable := variableOf(f.Name)
		path := os.Getenv(variable + "_FILE")
		if err != nil || path == "" || onLine[f.Name] || f.Name == "version" {
			return
		}
		if os.Getenv(variable) != "" {
			err = fmt.Errorf("%s and %[1]s_FILE are both set: unset one of them", variable)
			return
		}
		value, trouble := readText(path)
		switch {
		case trouble != nil:
			err = fmt.Errorf("%s_FILE: %w: the path of a file that has the value is wanted", variable, trouble)
		case value == "":
			err = fmt.Errorf("%s_FILE: %s is empty", variable, shown(path))
		default:
			inFile[f.Name] = true
			flags.Set(f.Name, value) // what is wrong with it is found out with the others
		}
	})
	return inFile, err
}

// explainFlag puts what the flag package says into words of ours, without what may be a secret.
func explainFlag(err error) error {
	if errors.Is(err, flag.ErrHelp) {
		return err
	}
	text := err.Error()
	if name, ok := strings.CutPrefix(text, "flag provided but not defined: -"); ok {
		// The name alone: --backstop:URL is one mistake in typing away.
		if end := strings.IndexFunc(name, func(r rune) bool { return r != '-' && (r < 'a' || r > 'z') }); end >= 0 {
			name = name[:end]
		}
		if name == "rules" { // of the last version of 2015
			return errors.New("--rules is called --prefix now; the list itself is as it was")
		}
		return fmt.Errorf("unknown option --%s; options are written --name=value; see --help", name)
	}
	if name, ok := strings.CutPrefix(text, "flag needs an argument: -"); ok {
		return fmt.Errorf("--%s needs a value: --%[1]s=VALUE; see --help", name)
	}
	return errors.New("an option is not written --name=value; see --help")
}

// version tells which build this is.
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

// newLogger returns the log that goes to standard error: what changes and what is wrong, and
// every poll where that is asked for.
func newLogger(w io.Writer, opts *options) *slog.Logger {
	handling := &slog.HandlerOptions{Level: slog.LevelInfo}
	if opts.once || opts.check {
		handling.Level = slog.LevelWarn // what is there to say is what is on standard output
	}
	if opts.verbose {
		handling.Level = slog.LevelDebug
	}
	if inJournal, _ := journal.StderrIsJournalStream(); inJournal {
		handling.ReplaceAttr = func(groups []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey && len(groups) == 0 {
				return slog.Attr{} // the journal has its own
			}
			return a
		}
	}
	return slog.New(slog.NewTextHandler(w, handling))
}

// run polls and delivers until SIGTERM or SIGINT, or once. It returns an error when, once,
// anything failed.
func run(opts *options, log *slog.Logger) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	sending, abort := context.WithCancelCause(context.Background())
	defer abort(nil)
	context.AfterFunc(ctx, func() {
		stop() // from here on a second signal ends the process at once
		time.AfterFunc(finishWithin, func() {
			abort(fmt.Errorf("no answer within the %s there are after a signal to end", finishWithin))
		})
	})

	if os.Getenv("SRV_RULES") != "" && opts.rules == nil {
		log.Warn("SRV_RULES, of this tool's last version of 2015, has no effect: call it SRV_PREFIX")
	}
	collector := newCollector(opts.engine, opts.rules, log)
	collector.per, collector.host, collector.flow.limit = opts.per, opts.host, opts.concurrency
	if opts.check {
		ok, err := collector.check(ctx, os.Stdout)
		if err != nil {
			log.Error("Docker engine does not answer", "error", errorText(err)+engineHint(err))
		} else if !ok {
			err = errors.New("not every container has a name of its own")
		}
		return err
	}
	name, to := "standard output", printer(os.Stdout)
	if opts.backstop != nil {
		name, to = opts.backstop.String(), destination{"Backstop", encode, opts.backstop.post}
		if trouble := opts.backstop.passwordTrouble(); trouble != "" {
			log.Warn(trouble)
		}
	}
	queue := newQueue(to, opts.spoolLimit, log.With("to", name))
	if opts.spool != "" && opts.backstop != nil {
		if err := queue.useSpool(&spool{dir: opts.spool, log: log}); err != nil {
			log.Error("not started: the folder of --spool is not for us", "spool", opts.spool, "error", errorText(err))
			return err
		}
	}
	service := newService(opts.poll, queue.describe)
	collector.alive = service.alive
	queue.rest = func() {
		service.update()
		if opts.backstop != nil && opts.poll > keepAlive {
			// The connection would not last until the next sweep, and its end would wake us up in between.
			opts.backstop.transport.CloseIdleConnections()
		}
	}
	sweep := func(ctx context.Context) sweepResult {
		start := time.Now()
		result := collector.sweep(ctx)
		if len(result.metrics) > 0 {
			queue.put(append(result.metrics, queue.own(collector.hostName(), start)...))
		}
		took := time.Since(start)
		service.hasSwept(result, took)
		log.Debug("swept", "running", result.running, "failed", result.failed,
			"metrics", len(result.metrics), "took", took.Round(time.Millisecond))
		return result
	}

	if opts.once {
		result := sweep(ctx)
		queue.close()
		if ctx.Err() != nil {
			log.Error("ended by a signal before all was polled")
		}
		err := queue.deliver(sending)
		if result.failed > 0 {
			err = errors.Join(err, fmt.Errorf("%d containers could not be read", result.failed))
		}
		return errors.Join(result.err, err)
	}

	log.Info("started", "version", version(), "to", name, "docker", opts.engine, "poll", opts.poll)
	service.ready()
	delivered := make(chan error, 1)
	go func() { delivered <- queue.deliver(sending) }()
	poll(ctx, func() schedule { return newSchedule(opts.poll, collector.hostName()) },
		func(ctx context.Context) { sweep(ctx) }, log)
	log.Info("ending")
	service.ending()
	queue.close()
	select {
	case <-delivered: // its log says what could not be delivered
	case <-sending.Done():
		// What stands on standard output's other end may have stopped reading, which no context ends.
		select {
		case <-delivered:
		case <-time.After(time.Second):
			log.Error("ending without having delivered everything", "error", context.Cause(sending))
		}
	}
	return nil
}
