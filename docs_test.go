package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
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
	var found []string
	for _, m := range regexp.MustCompile(pattern).FindAllStringSubmatch(text, -1) {
		found = append(found, m[1])
	}
	slices.Sort(found)
	return slices.Compact(found)
}

func TestReadmeHasTheOptionsOfHelp(t *testing.T) {
	const option, variable = `(?m)^ *\|? *` + "`?" + `(--[a-z]+(?:=[A-Z]+)?)\b`, `(?m)\b(SRV_[A-Z]+)\b`
	_, help, _ := strings.Cut(usage, "\nOptions")
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

func TestReadmeHasTheMetrics(t *testing.T) {
	sent := []string{"<c>.uptime", "<h>.containers.total", "<h>.metrics.duration"}
	golden, err := filepath.Glob("testdata/engine/*/*.golden")
	if err != nil || len(golden) == 0 {
		t.Fatal(golden, err)
	}
	for _, file := range golden {
		sent = append(sent, strings.Split(strings.Join(allOf(`(?m)^c(\.\S+)`, readFile(t, file)), "\n"), "\n")...)
	}
	for i, name := range sent {
		if strings.HasPrefix(name, ".") {
			sent[i] = "<c>" + name
		}
	}
	slices.Sort(sent)
	sent = slices.DeleteFunc(slices.Compact(sent), func(name string) bool { return name == "" })
	if documented := allOf("`(<[ch]>\\.[a-z_.]+)`", section(t, "## Metrics")); !slices.Equal(documented, sent) {
		t.Errorf("the README has the metrics\n%q, sent are\n%q", documented, sent)
	}
}

func TestReadmeNamesAreMade(t *testing.T) {
	rows := regexp.MustCompile("(?m)^\\| `([^`]+)`[^|]*\\| `(\\{.*\\})` \\| `([^`]+)\\.\\*` \\|$").FindAllStringSubmatch(section(t, "## Names"), -1)
	if len(rows) < 4 {
		t.Fatalf("only %d examples", len(rows))
	}
	for _, row := range rows {
		r, err := parseRule(row[2])
		if err != nil {
			t.Errorf("%s: %v", row[2], err)
		} else if got := r.path(row[1]); got != row[3] {
			t.Errorf("%s makes %s of %s, the README says %s", row[2], got, row[1], row[3])
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
		noEngine(t, "no systemd-analyze: %v", err)
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
