package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

func readFile(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// section returns the part of the README under a heading, up to the next one of that level.
func section(t *testing.T, heading string) string {
	t.Helper()
	_, rest, found := strings.Cut(readFile(t, "README.md"), "\n"+heading+"\n")
	if !found {
		t.Fatalf("the README has no %s", heading)
	}
	level, _, _ := strings.Cut(heading, " ")
	text, _, _ := strings.Cut(rest, "\n"+level+" ")
	return text
}

// allOf returns what the first group of the pattern matches in text, sorted, each once.
func allOf(pattern, text string) []string {
	found := allInOrder(pattern, text)
	slices.Sort(found)
	return slices.Compact(found)
}

// allInOrder is allOf in the order of the text.
func allInOrder(pattern, text string) []string {
	var found []string
	for _, m := range regexp.MustCompile(pattern).FindAllStringSubmatch(text, -1) {
		found = append(found, m[1])
	}
	return found
}

func TestReadmeHasTheOptionsOfHelp(t *testing.T) {
	const option, variable = `(?m)^ *\|? *` + "`?" + `(--[a-z-]+(?:=[A-Z]+)?)\b`, `(?m)\b(SRV_[A-Z_]+)\b`
	_, help, _ := strings.Cut(usage(), "\nOptions")
	options := section(t, "## Options")
	if got, want := allOf(option, options), allOf(option, help); !slices.Equal(got, want) {
		t.Errorf("the README has the options %q, --help has %q", got, want)
	}
	if got, want := allOf(variable, options), allOf(variable, help); !slices.Equal(got, want) {
		t.Errorf("the README has the variables %q, --help has %q", got, want)
	}
	file := readFile(t, "deploy/docker-stats-to-backstop.default")
	for _, name := range allOf(variable, file) {
		if !slices.Contains(allOf(variable, help), name) {
			t.Errorf("the file for the systemd unit has %s, which --help has not", name)
		}
	}
}

// everyMetric returns the names of all metrics that the code can make.
func everyMetric(t *testing.T) []string {
	// An answer that has everything, of all kinds of engines at once
	var s stats
	fill(reflect.ValueOf(&s).Elem())
	metrics := flattened(&s, origin{}, details{true, true, true})

	// Two sweeps, for what needs a sample before, and for the host
	r := newReplay(t, "cgroup2")
	c, _ := r.collector(t, 10*time.Second)
	c.host, c.containers.rules = "h", mustRules(t, `{"regexp":"^fx-busy$","into":"c","category":"any"}`)
	r.on("/containers/fx-busy/stats", r.serve("stats-busy.json"))
	c.sweep(t.Context())
	r.on("/containers/fx-busy/stats", nil)
	metrics = append(metrics, c.sweep(t.Context()).metrics...)
	metrics = append(metrics, newQueue(minSpool, c.log).own("h", time.Now())...)

	var names []string
	for _, m := range metrics {
		if name, ok := strings.CutPrefix(m.name(), "h."); ok {
			names = append(names, strings.Replace("<h>."+name, "containers.any", "containers.<category>", 1))
		} else if name, ok := strings.CutPrefix(m.name(), "c."); ok {
			names = append(names, strings.NewReplacer(".core.0", ".core.<i>", ".if0.", ".<if>.", ".1_1.", ".<major>_<minor>.").Replace("<c>."+name))
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// fill sets everything in v to 1, or to one of its kind.
func fill(v reflect.Value) {
	switch v.Kind() {
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(v.Elem())
	case reflect.Struct:
		if v.Type() == reflect.TypeFor[time.Time]() {
			v.Set(reflect.ValueOf(time.Unix(1795409680, 0)))
			return
		}
		if v.Type() == reflect.TypeFor[count]() {
			v.Set(reflect.ValueOf(counted(1)))
			return
		}
		for i := range v.NumField() {
			fill(v.Field(i))
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		fill(v.Index(0))
	case reflect.Map:
		entry := reflect.New(v.Type().Elem()).Elem()
		fill(entry)
		v.Set(reflect.MakeMap(v.Type()))
		v.SetMapIndex(reflect.ValueOf("if0"), entry)
	case reflect.Uint64:
		v.SetUint(1)
	}
}

// expand returns what a shell makes of braces: a.{x,y} is a.x and a.y.
func expand(name string) []string {
	m := regexp.MustCompile(`^(.*?)\{([^}]*)\}(.*)$`).FindStringSubmatch(name)
	if m == nil {
		return []string{name}
	}
	var names []string
	for part := range strings.SplitSeq(m[2], ",") {
		names = append(names, expand(m[1]+part+m[3])...)
	}
	return names
}

func TestMetricsAreDocumented(t *testing.T) {
	var documented []string
	for _, name := range allOf("(?m)^\\| `(<[ch]>[^`]+)`", readFile(t, "docs/metrics.md")) {
		documented = append(documented, expand(name)...)
	}
	slices.Sort(documented)
	sent := everyMetric(t)
	for _, name := range sent {
		if !slices.Contains(documented, name) {
			t.Errorf("docs/metrics.md lacks %s", name)
		}
	}
	for _, name := range documented {
		if !slices.Contains(sent, name) {
			t.Errorf("docs/metrics.md has %s, which nothing sends", name)
		}
	}
	// What the README shows of them has to be among them.
	for _, name := range allOf("`(<[ch]>[^`*]+)`", readFile(t, "README.md")) {
		for _, name := range expand(name) {
			if !slices.Contains(sent, name) {
				t.Errorf("the README has %s, which nothing sends", name)
			}
		}
	}
}

// Whoever looks a line of the log up finds it. Those of --verbose, and of a life without trouble, need no explanation.
func TestMessagesAreDocumented(t *testing.T) {
	sources, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, source := range sources {
		if strings.HasSuffix(source, "_test.go") {
			continue
		}
		for _, message := range allOf(`(?:log\.(?:Warn|Error|Info)\(|message :?= (?:q\.to\.name \+ )?)"([^"]+)"`, readFile(t, source)) {
			if slices.Contains([]string{"started", "ending", "Docker engine answers"}, message) {
				continue
			}
			n++
			start := regexp.MustCompile(`[:,]`).Split(message, 2)[0] // what follows is explained there
			if !strings.Contains(section(t, "## Troubleshooting"), strings.TrimSpace(start)) {
				t.Errorf("the README lacks %q", message)
			}
		}
	}
	if n < 15 {
		t.Errorf("only %d messages found", n)
	}
}

// Each recipe does what it says. A row has a container's name, its labels, as key=value, or its image; a rule, or "the same" as above;
// and the path that comes out, or none.
func TestReadmeRecipes(t *testing.T) {
	rows := regexp.MustCompile("(?m)^\\| ([^|]*`[^|]*) \\| (?:`([\\[{].*[\\]}])`|the same) \\| (?:`([^`]+)\\.\\*`|none) \\|$").FindAllStringSubmatch(section(t, "### Recipes"), -1)
	if len(rows) != strings.Count(section(t, "### Recipes"), "\n| ")-2 {
		t.Errorf("of the table's rows, only %d are understood", len(rows))
	}
	var rs rules
	for _, row := range rows {
		if row[2] != "" {
			rs = mustRules(t, row[2])
		}
		ticked := allInOrder("`([^`]+)`", row[1])
		s, host := subject{name: ticked[0], labels: map[string]string{}}, "h"
		for _, text := range ticked[1:] {
			if key, value, isLabel := strings.Cut(text, "="); isLabel {
				s.labels[key] = value
			} else if strings.Contains(text, "/") {
				s.image = text
			} else {
				host = text
			}
		}
		n := rs.apply(s, host)
		if n.drop {
			n.path = ""
		}
		if n.path != row[3] {
			t.Errorf("%s makes %q of %+v, the README says %q", row[2], n.path, s, row[3])
		}
	}
}

// What the README has for a shell arrives as it should.
func TestReadmeQuotingInAShell(t *testing.T) {
	forms := allOf(`(--prefix='[^']+')`, readFile(t, "README.md"))
	if len(forms) < 2 {
		t.Fatalf("only %q", forms)
	}
	for _, form := range forms {
		if strings.Contains(form, `\\\\`) {
			continue // a systemd unit's
		}
		got, err := exec.Command("sh", "-c", "printf %s "+form).Output()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := parseRules(strings.TrimPrefix(string(got), "--prefix=")); err != nil {
			t.Errorf("%s: %v", form, err)
		}
	}
}

// The same forms in the error text, the README and the file for the unit.
func TestQuotingIsTheSameEverywhere(t *testing.T) {
	readme := readFile(t, "README.md")
	forms := allOf(`((?:SRV_PREFIX=|--prefix=|)'[^']+')`, quoting)
	if len(forms) != 3 {
		t.Fatalf("forms %q", forms)
	}
	for _, form := range forms {
		if !strings.Contains(readme, form) {
			t.Errorf("the README lacks %s", form)
		}
	}
	if !strings.Contains(readFile(t, "deploy/docker-stats-to-backstop.default"), forms[2]) {
		t.Errorf("the file for the systemd unit lacks %s", forms[2])
	}
}

// systemd itself reads the unit, and the one in the README.
func TestSystemdTakesTheUnits(t *testing.T) {
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		cannot(t, "no systemd-analyze: %v", err)
	}
	binary, err := exec.LookPath(program) // see testscript.Main
	if err != nil {
		t.Fatal(err)
	}
	_, short, _ := strings.Cut(section(t, "## As a systemd service"), "\n    [Unit]")
	short, _, _ = strings.Cut(short, "\n\nIn an")
	for name, unit := range map[string]string{
		"shipped": readFile(t, "deploy/docker-stats-to-backstop.service"),
		"short":   strings.ReplaceAll("[Unit]"+short, "\n    ", "\n"),
	} {
		dir := t.TempDir()
		// It complains of a program that is not there, and a Docker that is not installed.
		file := filepath.Join(dir, program+".service")
		unit = strings.ReplaceAll(unit, "/usr/bin/"+program, binary)
		if err := os.WriteFile(file, []byte(unit), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "docker.service"), []byte("[Service]\nExecStart=/bin/true\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		verify := exec.Command("systemd-analyze", "verify", file)
		verify.Env = append(os.Environ(), fmt.Sprintf("SYSTEMD_UNIT_PATH=%s:", dir))
		// What it says of other units, those of this machine, is not ours to mend.
		if out, err := verify.CombinedOutput(); err != nil || strings.Contains(string(out), program) {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
	}
}

// The man page has each option with its text word for word as in --help, its examples, and what the code and the README say of
// exit statuses, variables and files.
func TestManPageSaysTheSame(t *testing.T) {
	page := regexp.MustCompile(`\\f.|(?m)^\.(?:[BI]|BR) `).ReplaceAllString(readFile(t, "deploy/docker-stats-to-backstop.1"), "")
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

	examples, help, _ := strings.Cut(usage(), "\nOptions; ")
	intro, options, _ := strings.Cut(help, "\n\n")
	text, _, _ := strings.Cut(chapter("OPTIONS"), "\n.TP")
	if got, want := oneLine(text), oneLine(intro); got != strings.Replace(want, "each can", "Each option can", 1) {
		t.Errorf("it says %q of the options, --help %q", got, want)
	}
	var names, texts []string
	for _, option := range regexp.MustCompile(`(?m)^  (--\S+)(?: +(SRV_[A-Z_]+))?`).FindAllStringSubmatch(options, -1) {
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
	commands := func(pattern, text string) string { return oneLine(strings.Join(allInOrder(pattern, text), "\n")) }
	if got, want := commands(`(?s)\.nf\n(.*?)\.fi`, chapter("EXAMPLES")), commands(`(?m)^    +(.*)$`, examples); got != want {
		t.Errorf("its examples are\n%s\nthose of --help\n%s", got, want)
	}

	statuses, _ := entries("EXIT STATUS")
	if want := append([]string{"0"}, allOf(`os\.Exit\((\d)\)`, readFile(t, "main.go"))...); !slices.Equal(statuses, want) {
		t.Errorf("it has the exit statuses %q, the code has %q", statuses, want)
	}
	readme := readFile(t, "README.md")
	variables, _ := entries("ENVIRONMENT")
	for _, name := range allOf(`([A-Z_]+)`, strings.Join(variables, "\n")) {
		if !strings.Contains(readme, name) {
			t.Errorf("the README lacks %s", name)
		}
	}
	// A path is one that a package brings, or the unit's folder.
	packages := readFile(t, "deploy/nfpm.yaml") + "/var/lib/" + strings.Join(allOf(`(?m)^StateDirectory=(.*)$`, readFile(t, "deploy/docker-stats-to-backstop.service")), "")
	paths, _ := entries("FILES")
	for _, path := range paths {
		if !strings.Contains(packages, path) || !strings.Contains(readme, path) {
			t.Errorf("there is no %s, or the README does not say so", path)
		}
	}
}
