package main

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/coreos/go-systemd/v22/journal"
)

// newLogger returns the log, which goes to w: lines that are short and without secrets.
func newLogger(w io.Writer, level slog.Level) *slog.Logger {
	inJournal, _ := journal.StderrIsJournalStream()
	replace := func(_ []string, a slog.Attr) slog.Attr {
		switch {
		case a.Key == slog.TimeKey && inJournal:
			return slog.Attr{} // the journal has its own
		case a.Key == slog.LevelKey:
			return a
		}
		return fitAttr(a)
	}
	handler := slog.NewTextHandler(w, &slog.HandlerOptions{Level: level, ReplaceAttr: replace})
	return slog.New(handler)
}

// fitAttr hides secrets in a, and bounds it: whatever others say, a line of the log is short.
func fitAttr(a slog.Attr) slog.Attr {
	most := maxForeign
	switch a.Key {
	case slog.MessageKey, "error", "example", "spool": // with our own words
		most = maxShown
	}
	if kind := a.Value.Kind(); kind == slog.KindString || kind == slog.KindAny {
		return slog.String(a.Key, fit(a.Value.String(), most))
	}
	return a
}

const (
	// maxUnread is how many lines may wait to be written.
	maxUnread = 1000
	// flushWithin is how long flush waits.
	flushWithin = time.Second
)

// logWriter writes lines in a goroutine of its own, run. A pipe or a journal that nobody reads
// holds up nothing: when too many wait, lines are left out, and the log says so.
type logWriter struct {
	out     io.Writer
	lines   chan []byte   // nil is the end
	done    chan struct{} // closed when run has ended
	missing atomic.Int64  // lines that were left out or not written
}

func newLogWriter(out io.Writer) *logWriter {
	return &logWriter{out: out, lines: make(chan []byte, maxUnread), done: make(chan struct{})}
}

// Write takes one line. It never fails: there is nobody to tell.
func (w *logWriter) Write(line []byte) (int, error) {
	select {
	case w.lines <- bytes.Clone(line):
	default:
		w.missing.Add(1)
	}
	return len(line), nil
}

// run writes lines until flush.
func (w *logWriter) run() {
	defer close(w.done)
	for ended := false; !ended; {
		line := <-w.lines
		ended = line == nil
		missing := w.missing.Load()
		if missing > 0 {
			line = fmt.Appendf(line, `level=WARN msg="lines are missing in the log, `+
				`they could not be written" lines=%d`+"\n", missing)
		}
		if _, err := w.out.Write(line); err != nil {
			missing = -1
		}
		w.missing.Add(-missing)
	}
}

// flush waits until everything is written, but not for long. Later lines are lost.
func (w *logWriter) flush() {
	late := time.After(flushWithin)
	select {
	case w.lines <- nil:
	case <-late:
	}
	select {
	case <-w.done:
	case <-late:
	}
}

const (
	// maxNews is how many lines about one thing are logged in an hour. The end of trouble may be
	// one more.
	maxNews = 10
	// repeatAfter is when an outage that goes on is logged again.
	repeatAfter = time.Hour
)

// news is what the log has said of one thing, such as a container. That may come and go with each
// poll, or have another text each time.
type news struct {
	said  string    // "" for: it is well
	at    time.Time // when
	since time.Time // when the hour began
	lines int       // in that hour
}

// isNew reports whether text is to be logged now. Beyond maxNews lines an hour it has to wait, and
// is logged later if it still holds.
func (n *news) isNew(text string) bool { return text != n.said && n.isAllowed(text) }

// isOld reports whether text is to be logged again: nothing was for a long time.
func (n *news) isOld(text string) bool {
	return time.Since(n.at) >= repeatAfter && n.isAllowed(text)
}

// isAllowed reports whether one more line is allowed, and takes note of it.
func (n *news) isAllowed(text string) bool {
	now := time.Now()
	if now.Sub(n.since) >= time.Hour {
		n.lines, n.since = 0, now
	}
	if n.lines >= maxNews && text != "" {
		return false
	}
	n.said, n.at = text, now
	n.lines++
	return true
}
