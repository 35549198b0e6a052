package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
)

func TestReadmeHasTheOptionsOfHelp(t *testing.T) {
	const option, variable = `(?m)^ *\|? *` + "`?" +
		`(--[a-z-]+(?:=[A-Z]+)?)\b`, `(?m)\b(SRV_[A-Z_]+)\b`
	_, help, _ := strings.Cut(usage(), "\nOptions")
	options := harness.Section(t, "README.md", "## Options")
	got, want := harness.AllOf(option, options), harness.AllOf(option, help)
	if !slices.Equal(got, want) {
		t.Errorf("the README has the options %q, --help has %q", got, want)
	}
	got, want = harness.AllOf(variable, options), harness.AllOf(variable, help)
	if !slices.Equal(got, want) {
		t.Errorf("the README has the variables %q, --help has %q", got, want)
	}
	file := harness.ReadFile(t, "deploy/docker-stats-to-backstop.default")
	for _, name := range harness.AllOf(variable, file) {
		if !slices.Contains(harness.AllOf(variable, help), name) {
			t.Errorf("the file for the systemd unit has %s, which --help has not", name)
		}
	}
}

// The man page has each option with its text word for word as in --help, its examples, and what the
// code and the documents say of exit statuses, variables and files.
func TestManPageSaysTheSame(t *testing.T) {
	fonts := regexp.MustCompile(`\\f.|(?m)^\.(?:[BI]|BR) `)
	page := fonts.ReplaceAllString(harness.ReadFile(t, "deploy/docker-stats-to-backstop.1"), "")
	page = strings.NewReplacer(`\-`, "-", `\e`, `\`, `\(aq`, "'", `\[u2026]`, "…").Replace(page)
	chapter := func(name string) string {
		_, rest, found := strings.Cut(page, "\n.SH "+name+"\n")
		if !found {
			t.Fatalf("no %s", name)
		}
		text, _, _ := strings.Cut(rest, "\n.SH ")
		return text
	}
	// entries returns what the chapter explains, and how, in its order.
	entries := func(name string) (of []string, explained []string) {
		for _, entry := range strings.Split(chapter(name), ".TP\n")[1:] {
			title, text, _ := strings.Cut(entry, "\n")
			of, explained = append(of, title), append(explained, oneLine(text))
		}
		return of, explained
	}

	help := usage()
	examples, help, _ := strings.Cut(help, "\nOptions; ")
	intro, options, _ := strings.Cut(help, "\n\n")
	text, _, _ := strings.Cut(chapter("OPTIONS"), "\n.TP")
	got, want := oneLine(text), strings.Replace(oneLine(intro), "each can", "Each option can", 1)
	if got != want {
		t.Errorf("it says %q of the options, --help %q", got, want)
	}
	var names, texts []string
	option := regexp.MustCompile(`(?m)^  (--\S+)(?: +(SRV_[A-Z_]+))?`)
	for _, option := range option.FindAllStringSubmatch(options, -1) {
		names = append(names, strings.TrimSuffix(option[1]+", "+option[2], ", "))
	}
	for _, text := range regexp.MustCompile(`(?m)^  --\S+(?: +SRV_[A-Z_]+)?`).Split(options, -1)[1:] {
		texts = append(texts, oneLine(text))
	}
	of, explained := entries("OPTIONS")
	if !slices.Equal(of, names) {
		t.Fatalf("it has the options\n%q, --help has\n%q", of, names)
	}
	for i := range of {
		if explained[i] != texts[i] {
			t.Errorf("of %s it says\n%s\n--help says\n%s", of[i], explained[i], texts[i])
		}
	}
	commands := func(pattern, text string) string {
		return oneLine(strings.Join(harness.AllInOrder(pattern, text), "\n"))
	}
	if got, want := commands(`(?s)\.nf\n(.*?)\.fi`, chapter("EXAMPLES")), commands(`(?m)^    +(.*)$`,
		examples); got != want {
		t.Errorf("its examples are\n%s\nthose of --help\n%s", got, want)
	}

	statuses, _ := entries("EXIT STATUS")
	if want := append([]string{"0"},
		harness.AllOf(`os\.Exit\((\d+)\)`,
			harness.ReadFile(t, "main.go"))...); !slices.Equal(statuses, want) {
		t.Errorf("it has the exit statuses %q, the code has %q", statuses, want)
	}
	documents := harness.Documentation(t)
	variables, _ := entries("ENVIRONMENT")
	for _, name := range harness.AllOf(`([A-Z_]+)`, strings.Join(variables, "\n")) {
		if !strings.Contains(documents, name) {
			t.Errorf("README and docs lack %s", name)
		}
	}
	// A path is one that a package brings, or the unit's folder.
	packages := harness.ReadFile(t, "deploy/nfpm.yaml") + "/var/lib/" +
		strings.Join(harness.AllOf(`(?m)^StateDirectory=(.*)$`,
			harness.ReadFile(t, "deploy/docker-stats-to-backstop.service")), "")
	paths, _ := entries("FILES")
	for _, path := range paths {
		if !strings.Contains(packages, path) || !strings.Contains(documents, path) {
			t.Errorf("there is no %s, or neither README nor docs say so", path)
		}
	}
}

// A file that is named by mistake has a secret in it, most likely.
func TestFilesAreNotShown(t *testing.T) {
	t.Cleanup(func() { secrets = nil })
	for _, opt := range new(options).table() {
		for _, content := range []string{"hidden", "user:hidden", "http://user:hidden@h", "hidden:x",
			`{"hidden":1}`, `"hidden"`, `{"regexp":"hidden("}`, "core,hidden", "@hidden", "hidden://h",
			"[{hidden", "-1\nhidden\n", `{"regexp":"x","into":"hidden","from":"hidden"}`} {
			isAny := opt.name == "spool" || opt.name == "host" // those take any text
			if opt.variable() == "" || isAny && !strings.Contains(content, "://") {
				continue
			}
			path := filepath.Join(t.TempDir(), "file")
			harness.Must(t, os.WriteFile(path, []byte(content), 0o600))
			t.Setenv(opt.variable()+"_FILE", path)
			_, err := parseOptions(nil)
			isGood := opt.name == "docker" && strings.Contains(content, "://")
			if !isGood && (err == nil || strings.Contains(err.Error(), "hidden")) {
				t.Errorf("%s_FILE with %s: %v", opt.variable(), content, err)
			}
			os.Unsetenv(opt.variable() + "_FILE")
		}
	}
}

// Blanks and carriage returns around a value are cut, wherever it comes from: files from Windows
// have them.
func TestValuesAreTrimmed(t *testing.T) {
	noDockerEnv(t)
	dir := t.TempDir()
	values := map[string]string{"backstop": "http://h/publish/docker", "docker": "tcp://engine:2375",
		"prefix": `{"regexp":"x","into":"y"}`, "poll": "7s", "host": "me", "per": "core,device",
		"spool": dir, "spool-limit": "7MiB", "concurrency": "7", "check": "true", "once": "true",
		"verbose": "true"}
	isRight := func(why string, o *options, err error) {
		t.Helper()
		if err != nil {
			t.Errorf("%s: %v", why, err)
			return
		}
		got := fmt.Sprintln(o.to.address, o.engine, len(o.rules), o.poll, o.host, o.per, o.spool,
			o.spoolLimit, o.concurrency, o.switches)
		if got != "http://h/publish/docker http://engine:2375 1 7s me {true false true} "+dir+
			" 7340032 7 {true true true false}\n" {
			t.Errorf("%s: %s", why, got)
		}
	}
	for _, opt := range new(options).table() {
		if _, there := values[opt.name]; !there && !opt.flagOnly {
			t.Errorf("no value for --%s", opt.name)
		}
	}
	for _, around := range []string{"", " ", "\r", "\t \r\n", "\r\r"} {
		var args []string
		for name, value := range values {
			args = append(args, "--"+name+"="+around+value+around)
		}
		o, err := parseOptions(args)
		isRight(fmt.Sprintf("options with %q", around), o, err)
		for name, value := range values {
			opt := option{name: name}
			t.Setenv(opt.variable(), around+value+around)
		}
		o, err = parseOptions(nil)
		isRight(fmt.Sprintf("variables with %q", around), o, err)
		for name, value := range values {
			opt := option{name: name}
			path := filepath.Join(t.TempDir(), name)
			harness.Must(t, os.WriteFile(path, []byte(around+value+around), 0o600))
			t.Setenv(opt.variable(), around)
			t.Setenv(opt.variable()+"_FILE", path+around)
		}
		o, err = parseOptions(nil)
		isRight(fmt.Sprintf("files with %q", around), o, err)
		for name := range values {
			opt := option{name: name}
			t.Setenv(opt.variable()+"_FILE", "")
		}
	}
	for host, want := range map[string]string{"tcp://other\r": "http://other:2375",
		"\r": defaultDocker, " ": defaultDocker} {
		t.Setenv("DOCKER_HOST", host)
		t.Setenv("DOCKER_TLS_VERIFY", "\r")
		t.Setenv("DOCKER_CERT_PATH", "\r")
		if o, err := parseOptions(nil); err != nil || o.engine.String() != want {
			t.Errorf("DOCKER_HOST=%q: %v, %v", host, o, err)
		}
	}
}
