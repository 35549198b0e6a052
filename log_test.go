package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
)

// A reader finds each line of the log in the documents, but those of --verbose and those of a life
// without trouble.
func TestMessagesAreDocumented(t *testing.T) {
	sources, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	documented, n := harness.Section(t, "docs/troubleshooting.md", "## Messages"), 0
	for _, source := range sources {
		if strings.HasSuffix(source, "_test.go") {
			continue
		}
		text := harness.ReadFile(t, source)
		for _, message := range append(harness.AllOf(`log\.(?:Warn|Error|Info)\("([^"]+)"`, text),
			harness.AllOf(`return "(.+, keeping .+)"`, text)...) {
			if slices.Contains([]string{"started", "ending", "Docker engine answers"}, message) {
				continue
			}
			n++
			start := regexp.MustCompile(`[:,]`).Split(message, 2)[0] // what follows is explained there
			if !strings.Contains(documented, strings.TrimSpace(start)) {
				t.Errorf("docs/troubleshooting.md lacks %q", message)
			}
		}
	}
	if n < 15 {
		t.Errorf("only %d messages found", n)
	}
}

// Of what others send, a line of the log has 200 bytes, and is made at once.
func TestLogIsBounded(t *testing.T) {
	t.Parallel()
	huge := strings.Repeat("\x00x", 1<<20)
	for place, answer := range repetitions {
		address := hostile(t, func(string) string { return fmt.Sprintf(answer, huge) })
		for _, args := range [][]string{{"--docker=http://" + address}, {"--docker=" +
			harness.NewReplay(t, "cgroup2").URL, "--backstop=http://" + address + "/publish/docker"}} {
			args = append(args, "--once", "--verbose")
			out, _ := exec.Command(program, args...).CombinedOutput()
			for line := range strings.Lines(string(out)) {
				if len(line) > maxShown {
					t.Errorf("%s makes a line of %d bytes: %.500s", place, len(line), line)
				}
			}
		}
	}
}

// A log that nobody reads, or whose reader has ended, holds up neither polls nor the end.
func TestTheLogHoldsUpNothing(t *testing.T) {
	if runtime.GOOS != "linux" {
		harness.Cannot(t, "other systems' pipes differ")
	}
	t.Parallel()
	reader, writer, err := os.Pipe()
	harness.Must(t, err)
	harness.Must(t, writer.SetWriteDeadline(time.Now().Add(100*time.Millisecond)))
	if _, err := writer.Write(make([]byte, 1<<20)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("the pipe is not full: %v", err)
	}
	s := harness.NewStandIn(t)
	daemon := exec.Command(program, "--docker="+harness.NewReplay(t, "cgroup2").URL,
		"--backstop="+s.URL+"/publish/docker", "--poll=10ms", "--verbose")
	daemon.Stderr = writer
	harness.Must(t, daemon.Start())
	t.Cleanup(func() { daemon.Process.Kill() })
	writer.Close()
	awaitDeliveries(t, s)
	reader.Close()
	awaitDeliveries(t, s)
	interrupt(t, daemon)
}

// The end waits for what is still to be written, but not for long.
func TestTheLogIsFlushed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, takes := range []time.Duration{flushWithin / 10, time.Hour} {
			w, written := startLog(func([]byte) (int, error) { time.Sleep(takes); return 0, nil })
			for range 5 {
				fmt.Fprintln(w, "line")
				synctest.Wait()
			}
			start := time.Now()
			w.flush()
			if took := time.Since(start); took > flushWithin ||
				takes < flushWithin && strings.Count(written.String(), "line\n") != 5 {
				t.Errorf("lines that take %s: in %s\n%s", takes, took, written)
			}
			<-w.done
		}
	})
}

// A burst loses nothing. Where nobody takes the lines for long, some are missing, and the log says
// so, at the end as well.
func TestTheLogSaysWhatIsMissing(t *testing.T) {
	const missing = `level=WARN msg="lines are missing in the log, they could not be written" lines=`
	for lines, want := range map[int]string{
		maxUnread / 2: "last\n", 3 * maxUnread: missing + "2001\n",
	} {
		synctest.Test(t, func(t *testing.T) {
			later := time.Now().Add(time.Minute)
			w, written := startLog(func([]byte) (int, error) {
				time.Sleep(time.Until(later))
				return 0, nil
			})
			fmt.Fprintln(w, "busy")
			synctest.Wait()
			for range lines {
				fmt.Fprintln(w, "line")
			}
			fmt.Fprintln(w, "last")
			time.Sleep(time.Until(later) - flushWithin/2)
			w.flush()
			got := written.String()
			if n := strings.Count(got, "line\n"); n != min(lines, maxUnread) ||
				!strings.Contains(got, want) {
				t.Errorf("%d lines: %d were written", lines, n)
			}
			<-w.done
		})
	}
}

// Where the disk of the log is full, the lines that it did not take are counted.
func TestTheLogCountsWhatFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		full := true
		w, written := startLog(func([]byte) (n int, err error) {
			if full {
				err = syscall.ENOSPC
			}
			return 0, err
		})
		for range 400 {
			fmt.Fprintln(w, "first")
			synctest.Wait()
		}
		full = false
		fmt.Fprintln(w, "last")
		w.flush()
		want := "last\n" + `level=WARN msg="lines are missing in the log, they could not be written" ` +
			"lines=400\n"
		if got := written.String(); got != want {
			t.Errorf("logged\n%s", got)
		}
	})
}

// startLog starts a log. write is called before something is written; with an error, only so much
// of that is.
func startLog(write func(text []byte) (int, error)) (*logWriter, *harness.Log) {
	written := &harness.Log{}
	w := newLogWriter(writerFunc(func(text []byte) (int, error) {
		n, err := write(text)
		if err == nil {
			n = len(text)
		}
		written.Write(text[:n])
		return n, err
	}))
	go w.run()
	return w, written
}

type writerFunc func(line []byte) (int, error)

func (f writerFunc) Write(line []byte) (int, error) { return f(line) }

// What net/http has to say is one line of the log, and only with --verbose.
func TestComplaintsOfNetHTTPAreLogged(t *testing.T) {
	var answers atomic.Int32
	address := hostile(t, func(string) string {
		answers.Add(1)
		return "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}HTTP/1.1 500 \r\n\r\n"
	})
	for _, level := range []string{"--verbose", "--verbose=false"} {
		daemon := exec.Command(program, "--docker=http://"+address, "--poll=100ms", level)
		log := &harness.Log{}
		daemon.Stderr = log
		harness.Must(t, daemon.Start())
		if level == "--verbose" {
			harness.AwaitText(t, log.String, `level=DEBUG msg="Unsolicited`, 2)
		} else {
			answers.Store(0)
			count := func() string { return strings.Repeat(".", int(answers.Load())) }
			harness.AwaitText(t, count, ".", 10)
		}
		harness.Must(t, daemon.Process.Kill())
		_ = daemon.Wait()
		for line := range strings.Lines(log.String()) {
			if !regexp.MustCompile(`^time=\S+ level=\w+ msg=`).MatchString(line) {
				t.Errorf("logged: %s", line)
			}
		}
	}
}
