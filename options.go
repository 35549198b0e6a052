package main

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/docker/go-units"
)

const intro = `Feeds Graphite with the stats of this host's Docker containers, through Backstop.

See what would be sent:

    docker-stats-to-backstop --once

Send it every minute:

    docker-stats-to-backstop --backstop=https://user:password@backstop.server/publish/docker

The same, with the metrics of my.container.name.x under my.name:

    docker-stats-to-backstop --backstop=https://user:password@backstop.server/publish/docker \
      --prefix='{"regexp":"(.*)\\..*\\.(.*)\\..*","into":"$1.$2"}' --poll=60s

Options; each can also be set by the variable beside it. Add _FILE to a variable's name to
read its value from a file: SRV_BACKSTOP_FILE=/run/secrets/backstop. An option wins over
its variable. An empty variable counts as unset.

`

const (
	// maxCall is the longest timeout of a call to the engine.
	maxCall = 10 * time.Second
	// Bounds of --spool-limit, in bytes. A sweep of over a thousand containers fits into minSpool.
	minSpool = 1 << 20
	maxSpool = 1 << 50
)

// options are the values of all options, checked.
type options struct {
	to          destination
	prints      bool // whether that is standard output as nothing else is set
	engine      *engine
	rules       rules
	poll        time.Duration
	host        string
	per         details
	spool       string // absolute path of the folder; "": keep metrics in memory
	spoolLimit  int64  // bytes
	concurrency int    // 0: adapt to the engine
	switches
}

type switches struct{ check, once, verbose, version bool }

type option struct {
	name     string
	value    string // what --help calls the value; "": the option is a switch
	fallback string // the value if none is given
	origin   string // the variable of another program that fallback may come from
	flagOnly bool   // whether no variable sets it
	address  bool   // whether the value may have credentials in it; errors of set do not show them
	help     string // each line as --help prints it; %s stands for fallback
	set      func(text string) error
}

// table lists all options in the order of --help. Their set functions write to o.
func (o *options) table() []option {
	state, _, _ := strings.Cut(os.Getenv("STATE_DIRECTORY"), ":") // systemd may list several
	return []option{
		{name: "backstop", value: "URL", address: true,
			set: into(&o.to, parseDestination),
			help: "where to send to: an http or https URL of Backstop, with\n" +
				"user:password@ for Basic authentication; or Carbon itself,\n" +
				"carbon://HOST[:2003][/PREFIX], or carbons://HOST:PORT[/PREFIX]\n" +
				"with TLS; - prints the metrics instead, as lines of Carbon's\n" +
				"plaintext protocol (default: -)"},
		{name: "docker", value: "URL", fallback: cmp.Or(env("DOCKER_HOST"), defaultDocker),
			origin: "DOCKER_HOST", address: true, set: into(&o.engine, parseEngine),
			help: "the Docker engine: unix:///path, tcp://host:port, http:// or\n" +
				"https://, on Windows also npipe://; DOCKER_TLS_VERIFY and\n" +
				"DOCKER_CERT_PATH work as for the docker command\n" +
				"(default: $DOCKER_HOST, else " + defaultDocker + ")"},
		{name: "prefix", value: "JSON", set: into(&o.rules, parseRules),
			help: "a rule that makes the prefix of a container's metrics from its\n" +
				`name: {"regexp":"…","into":"…"} replaces each match of the Go` + "\n" +
				`regular expression by "into"; $1 is its first group, ${host} this` + "\n" +
				"host's name. Or a list of rules: the first that matches counts.\n" +
				"Or @FILE with them. docs/names.md has recipes and more keys:\n" +
				`"from", "category", "drop". --check shows the result` + "\n" +
				"(default: the name as it is)"},
		{name: "poll", value: "DURATION", fallback: "60s", set: into(&o.poll, parsePoll),
			help: "how often, such as 10s, 1m or 1m30s (default: %s)"},
		{name: "host", value: "NAME", set: into(&o.host, parseHost),
			help: "the prefix of this host's own metrics\n" +
				"(default: the engine's name for its host)"},
		{name: "per", value: "LIST", set: into(&o.per, parseDetails),
			help: "finer series as well: core, interface, device, or several with\n" +
				"commas between (default: none)"},
		{name: "spool", value: "DIR", fallback: state, origin: "STATE_DIRECTORY",
			set: into(&o.spool, parseSpool),
			help: "keep metrics in this folder until they are delivered, so that they\n" +
				"survive a restart, a kill and a power cut (default:\n" +
				"$STATE_DIRECTORY, which systemd sets, else none: they are kept in\n" +
				"memory)"},
		{name: "spool-limit", value: "SIZE", fallback: "256MiB",
			set: into(&o.spoolLimit, parseSpoolLimit),
			help: "how much is kept at most, in the folder or in memory; then the\n" +
				"oldest metrics are dropped (default: %s)"},
		{name: "concurrency", value: "N", set: into(&o.concurrency, parseConcurrency),
			help: "how many calls to the engine at the same time\n" +
				"(default: as many as it needs, up to 512)"},
		{name: "check", set: into(&o.check, strconv.ParseBool),
			help: "show what --prefix makes of each running container, send nothing,\n" +
				"and exit: 0, or 1 if a container gets no name of its own or the\n" +
				"engine does not answer"},
		{name: "once", set: into(&o.once, strconv.ParseBool),
			help: "poll once, deliver, and exit: 0, or 1 if anything failed"},
		{name: "verbose", set: into(&o.verbose, strconv.ParseBool),
			help: "log every poll and delivery as well"},
		// SRV_VERSION is often there for something else.
		{name: "version", flagOnly: true, set: into(&o.version, strconv.ParseBool),
			help: "print the version and exit"},
		{name: "help", flagOnly: true, help: "print this and exit"}, // set by the flag package
	}
}

// into returns a function that parses a text and stores the result in target.
func into[T any](target *T, parse func(string) (T, error)) func(string) error {
	return func(text string) (err error) {
		*target, err = parse(text)
		return err
	}
}

func usage() string {
	const indent = 35 // columns left of the help texts
	margin := "\n" + strings.Repeat(" ", indent)
	var b strings.Builder
	b.WriteString(intro)
	for _, opt := range new(options).table() {
		form := "--" + opt.name
		if opt.value != "" {
			form += "=" + opt.value
		}
		head := fmt.Sprintf("  %-16s  %-13s  ", form, opt.variable())
		if len(head) > indent {
			head = strings.TrimRight(head, " ") + margin
		}
		help := strings.ReplaceAll(opt.help, "%s", opt.fallback)
		b.WriteString(head + strings.ReplaceAll(help, "\n", margin) + "\n")
	}
	return b.String()
}

// parseOptions reads the options from args and from the environment. Its errors are one
// line and show no value that may hold a secret. For --help it returns flag.ErrHelp.
func parseOptions(args []string) (*options, error) {
	o := new(options)
	table := o.table()
	flags, err := parseFlags(table, args)
	if err != nil {
		return nil, err
	}
	if _, o.version = flags["version"]; o.version { // the other options do not matter
		return o, nil
	}
	for _, proxy := range []string{"HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"} {
		secrets.addFrom(os.Getenv(proxy))
	}
	for _, opt := range table {
		if err := opt.parse(flags); err != nil {
			return nil, err
		}
	}
	if o.prints = o.to.post == nil; o.prints {
		o.to = printer(os.Stdout)
	}
	// A container that hangs must not delay the next poll.
	o.engine.timeout = min(maxCall, o.poll-o.poll/10)
	return o, nil
}

func (opt *option) parse(flags map[string]string) error {
	text, from, err := opt.lookUp(flags)
	if text = strings.TrimSpace(text); err != nil || text == "" { // files have ends of lines
		return err
	}
	if opt.address {
		secrets.addFrom(text)
	}
	quote, last := text[0], text[len(text)-1]
	if (quote == '\'' || quote == '"') && quote == last && len(text) > 1 {
		return fmt.Errorf("%s: there are quotes (%c) around the value that no shell has removed; "+
			"leave them out", from, quote)
	}
	err = opt.set(text)
	switch variable := opt.variable(); {
	case err == nil:
		return nil
	case opt.value == "":
		return fmt.Errorf("%s must be true or false", from)
	case from == variable+"_FILE" && !opt.address: // it may be another file, with a secret in it
		return fmt.Errorf("%s: the content of %s, not shown here, is no value for --%s; see --help",
			from, shown(os.Getenv(from)), opt.name)
	case errors.As(err, new(misquoted)):
		return fmt.Errorf("%s: %s: %w", from, quoting(from), err)
	}
	return fmt.Errorf("%s: %w", from, err)
}

// parseFlags returns the unparsed values on the command line by name.
func parseFlags(table []option, args []string) (map[string]string, error) {
	given := map[string]string{}
	flags := flag.NewFlagSet(program, flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	for _, opt := range table {
		// The values are parsed later: errors of the flag package show them, passwords too.
		keep := func(text string) error { given[opt.name] = text; return nil }
		switch {
		case opt.set == nil:
		case opt.value == "":
			flags.BoolFunc(opt.name, "", keep)
		default:
			flags.Func(opt.name, "", keep)
		}
	}
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return nil, err
	} else if err != nil {
		// Its text has no values in it, but a user may have typed --backstop:URL.
		what, name, _ := strings.Cut(err.Error(), ": ")
		name, _, _ = strings.Cut(name, ":")
		if name == "-rules" { // in the last version of 2015
			return nil, errors.New("--rules is called --prefix now; the list stays the same")
		}
		var names []string
		for _, opt := range table {
			names = append(names, "--"+opt.name)
		}
		return nil, fmt.Errorf("%s: %s; options are written --name=value; there are %s", what, name,
			strings.Join(names, ", "))
	}
	if flags.NArg() > 0 {
		stray := shown(flags.Arg(0))
		if strings.Contains(stray, ":") { // probably user:password
			stray = shown("@")
		}
		return nil, fmt.Errorf(
			"unexpected argument %s: options are written --name=value; see --help", stray)
	}
	return given, nil
}

// variable returns the name of the option's environment variable, "" if it has none.
func (opt *option) variable() string {
	if opt.flagOnly {
		return ""
	}
	return "SRV_" + strings.ToUpper(strings.ReplaceAll(opt.name, "-", "_"))
}

// lookUp returns the unparsed value of the option, and where it comes from: the flag if it is
// given, else the variable, else the file that the _FILE variable names, else the default.
func (opt *option) lookUp(flags map[string]string) (text, from string, err error) {
	from = "--" + opt.name
	if text, isGiven := flags[opt.name]; isGiven || opt.flagOnly {
		switch {
		case opt.value == "":
		case strings.TrimSpace(text) == "":
			err = fmt.Errorf("%s is empty: give it a value, "+
				"or leave it out for the default; see --help", from)
		case strings.HasPrefix(text, "--"): // the next option, taken for the value
			err = fmt.Errorf("%s needs a value: %[1]s=VALUE; see --help", from)
		}
		return text, from, err
	}
	variable := opt.variable()
	text = strings.TrimSpace(os.Getenv(variable))
	path := strings.TrimSpace(os.Getenv(variable + "_FILE"))
	switch {
	case text != "" && path != "":
		return "", "", fmt.Errorf("%s and %[1]s_FILE are both set: unset one of them", variable)
	case text != "":
		return text, variable, nil
	case path == "":
		return opt.fallback, cmp.Or(opt.origin, from), nil
	}
	from = variable + "_FILE"
	text, err = readText(path)
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", from, err,
			fileRemedy(err, "give the path of a file with the value"))
	} else if text == "" {
		err = fmt.Errorf("%s: %s is empty", from, shown(path))
	}
	return text, from, err
}

func (o *options) logLevel() slog.Level {
	switch {
	case o.verbose:
		return slog.LevelDebug
	case o.once || o.check:
		return slog.LevelWarn // the result is on standard output
	}
	return slog.LevelInfo
}

// warnOfVariables logs variables that look like ours, and are not: a typing mistake, most likely.
func (o *options) warnOfVariables(log *slog.Logger) {
	known := map[string]bool{"SRV_VERSION": true} // it is often there for something else
	for _, opt := range o.table() {
		known[opt.variable()], known[opt.variable()+"_FILE"] = true, true
	}
	for _, entry := range os.Environ() {
		name, value, _ := strings.Cut(entry, "=")
		switch {
		case !strings.HasPrefix(name, "SRV_") || value == "" || known[name]:
		case name == "SRV_RULES" && o.rules == nil:
			log.Warn("SRV_RULES, of this tool's last version of 2015, has no effect: " +
				"call it SRV_PREFIX")
		case name != "SRV_RULES":
			log.Warn("unknown environment variable ignored, see --help", "variable", name)
		}
	}
}

// warnOfContext logs that the docker command of this user shows the containers of another engine.
func (o *options) warnOfContext(log *slog.Logger) {
	if name, endpoint := dockerContext(); endpoint != "" && !o.engine.isAt(endpoint) {
		log.Warn("the Docker context names another engine than the one that is asked",
			"context", name, "docker", o.engine, "set", "--docker="+endpoint)
	}
}

func parseDestination(text string) (destination, error) {
	if text == "-" {
		return printer(os.Stdout), nil
	}
	scheme, _, _ := strings.Cut(strings.ToLower(text), ":")
	if scheme == "carbon" || scheme == "carbons" {
		c, err := newCarbon(text)
		if err != nil {
			return destination{}, err
		}
		return c.destination(), nil
	}
	b, err := newBackstop(text)
	if err != nil {
		return destination{}, err
	}
	return b.destination(), nil
}

func parseEngine(text string) (*engine, error) { return newEngine(text, maxCall) }

func parsePoll(text string) (time.Duration, error) {
	poll, err := time.ParseDuration(text)
	if err != nil {
		return 0, fmt.Errorf(
			"%s is not a duration; write one with its unit, such as 60s or 1m30s", shown(text))
	}
	if poll <= 0 {
		return 0, fmt.Errorf("%s is not longer than 0; write a duration such as 60s", text)
	}
	return poll, nil
}

// hostName matches what can be the name of a host, and not much else: a file that was named by
// mistake must not get into Graphite.
var hostName = regexp.MustCompile(`^[A-Za-z0-9_.-]*[A-Za-z0-9][A-Za-z0-9_.-]*$`)

func parseHost(text string) (string, error) {
	if !hostName.MatchString(text) || len(text) > maxNode {
		return "", fmt.Errorf("%s is not the name of a host: write letters, digits, dots, - and _",
			shown(text))
	}
	return text, nil
}

// parseSpool returns the absolute path of a folder that can be a spool.
func parseSpool(text string) (string, error) {
	if strings.Contains(text, "://") || strings.ContainsFunc(text, unicode.IsControl) {
		return "", fmt.Errorf("%s is not the path of a folder", shown(text))
	}
	dir, err := filepath.Abs(text)
	if err != nil {
		return "", err
	}
	// If the disk hangs, open looks again.
	trouble, _ := inTime(storeWait, func() string { return spoolTrouble(dir) })
	if trouble != "" {
		return "", fmt.Errorf("%s: %s", shown(text), trouble)
	}
	return dir, nil
}

func parseSpoolLimit(text string) (int64, error) {
	limit, err := units.RAMInBytes(text)
	if err != nil {
		return 0, fmt.Errorf(
			"%s is not a size; write one such as 256MiB, 512M or 1GiB", shown(text))
	}
	if limit < minSpool || limit > maxSpool {
		return 0, fmt.Errorf(
			"%s is not between 1MiB and 1PiB; write a size such as 256MiB", shown(text))
	}
	return limit, nil
}

func parseConcurrency(text string) (int, error) {
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 || n > maxInFlight {
		return 0, fmt.Errorf("%s is not a number from 1 to %d; "+
			"leave it out for the default, which suits most engines", shown(text), maxInFlight)
	}
	return n, nil
}
