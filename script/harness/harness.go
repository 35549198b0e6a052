// Package harness has the stand-ins that the tests share: a Backstop, an engine of recorded
// answers, and real engines.
package harness

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// Program is the daemon's name.
const Program = "docker-stats-to-backstop"

// Cannot ends a test that lacks something. The test is skipped, or fails where REQUIRE_ENGINE is
// set, as script/test does.
func Cannot(t testing.TB, format string, args ...any) {
	t.Helper()
	why := fmt.Sprintf(format, args...)
	if os.Getenv("REQUIRE_ENGINE") != "" {
		t.Fatal(why)
	}
	t.Skip(why)
}

// NoEngine is Cannot, where an engine or what comes with it is missing.
func NoEngine(t testing.TB, format string, args ...any) {
	t.Helper()
	Cannot(t, format+"; script/engine brings one", args...)
}

// Must ends the test if there is an error.
func Must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Top returns the top folder of the repository.
func Top(t testing.TB) string {
	t.Helper()
	dir, err := top()
	Must(t, err)
	return dir
}

func top() (string, error) {
	dir, err := os.Getwd()
	for err == nil {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", errors.New("no go.mod in this folder or above")
		}
		dir = parent
	}
	return "", err
}

// ReadFile returns the text of a file. A path that is not absolute starts at the top of the
// repository.
func ReadFile(t testing.TB, path string) string {
	t.Helper()
	if !filepath.IsAbs(path) {
		path = filepath.Join(Top(t), path)
	}
	text, err := os.ReadFile(path)
	Must(t, err)
	return string(text)
}

// Documents returns the paths of README.md and of the pages in docs that are not generated.
func Documents(t testing.TB) []string {
	t.Helper()
	pages, err := fs.Glob(os.DirFS(Top(t)), "docs/*.md")
	Must(t, err)
	pages = slices.DeleteFunc(pages, func(page string) bool { return page == "docs/third-party.md" })
	return append([]string{"README.md"}, pages...)
}

// Documentation returns the text of all Documents.
func Documentation(t testing.TB) string {
	t.Helper()
	var text strings.Builder
	for _, page := range Documents(t) {
		text.WriteString(ReadFile(t, page))
	}
	return text.String()
}

// Section returns the part of a page under a heading, up to the next one of its level or above.
func Section(t testing.TB, page, heading string) string {
	t.Helper()
	_, rest, found := strings.Cut(ReadFile(t, page), "\n"+heading+"\n")
	if !found {
		t.Fatalf("%s has no %s", page, heading)
	}
	level := strings.Index(heading, " ")
	return regexp.MustCompile(fmt.Sprintf(`\n#{1,%d} `, level)).Split(rest, 2)[0]
}

// AllOf returns what the first group of the pattern matches in text, sorted, each once.
func AllOf(pattern, text string) []string {
	found := AllInOrder(pattern, text)
	slices.Sort(found)
	return slices.Compact(found)
}

// AllInOrder is AllOf in the order of the text.
func AllInOrder(pattern, text string) []string {
	var found []string
	for _, m := range regexp.MustCompile(pattern).FindAllStringSubmatch(text, -1) {
		found = append(found, m[1])
	}
	return found
}

// Expand returns what a shell makes of braces: a.{x,y} is a.x and a.y.
func Expand(name string) []string {
	m := regexp.MustCompile(`^(.*?)\{([^}]*)\}(.*)$`).FindStringSubmatch(name)
	if m == nil {
		return []string{name}
	}
	var names []string
	for part := range strings.SplitSeq(m[2], ",") {
		names = append(names, Expand(m[1]+part+m[3])...)
	}
	return names
}

// AwaitText waits until what read returns, a log mostly, has text in it so many times.
func AwaitText(t testing.TB, read func() string, text string, times int) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(10 * time.Millisecond) {
		all := read()
		if strings.Count(all, text) >= times {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not %d times %s in\n%s", times, text, all)
		}
	}
}

// Log keeps what is logged.
type Log struct {
	mu   sync.Mutex
	text strings.Builder
}

// Write is that of an io.Writer.
func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

// String returns the lines since the last Take.
func (l *Log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// Take returns the lines since the last call, without their times.
func (l *Log) Take() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.text.Reset()
	return l.text.String()
}

// Logger returns a logger as the daemon has it, quiet and without times.
func (l *Log) Logger() *slog.Logger {
	untimed := func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{ReplaceAttr: untimed}))
}

// Built is a testing.M that has the daemon, built of this source, in the path.
type Built struct{ *testing.M }

// Run builds the daemon and runs the tests.
func (b Built) Run() int {
	dir, err := os.MkdirTemp("", "dstb")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	if err := build(dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	os.Setenv("PATH", dir+string(filepath.ListSeparator)+os.Getenv("PATH"))
	return b.M.Run()
}

// build builds the daemon into dir, with the race detector if the tests have it.
func build(dir string) error {
	root, err := top()
	if err != nil {
		return err
	}
	args := []string{"build", "-o", dir, "."}
	if info, ok := debug.ReadBuildInfo(); ok &&
		slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) {
		args = slices.Insert(args, 1, "-race")
	}
	command := exec.Command("go", args...)
	command.Dir = root
	if out, err := command.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", command, err, out)
	}
	return nil
}
