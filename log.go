package main

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coreos/go-systemd/v22/journal"
)

// newLogger returns the log, which goes to w.
func newLogger(w io.Writer, level slog.Level) *slog.Logger {
	handling := &slog.HandlerOptions{Level: level}
	inJournal, _ := journal.StderrIsJournalStream()
	handling.ReplaceAttr = func(groups []string, a slog.Attr) slog.Attr {
		switch {
		case len(groups) > 0:
			return fitAttr(a)
		case a.Key == slog.TimeKey && inJournal:
			return slog.Attr{} // the journal has its own
		case a.Key == slog.TimeKey || a.Key == slog.LevelKey || a.Key == slog.MessageKey:
			return a // our own words
		}
		return fitAttr(a)
	}
	return slog.New(bounded{slog.NewTextHandler(w, handling), new(said)})
}

// fitAttr hides secrets in a, and bounds it: whatever others say, a line of the log is short.
func fitAttr(a slog.Attr) slog.Attr {
	most := maxForeign
	switch a.Key {
	case "error", "example", "spool": // with our own words
		most = maxShown
	}
	if kind := a.Value.Kind(); kind == slog.KindString || kind == slog.KindAny {
		return slog.String(a.Key, fit(a.Value.String(), most))
	}
	return a
}

// complaints logs what net/http has to say, which goes to the log package.
type complaints struct{ log *slog.Logger }

func (c complaints) Write(text []byte) (int, error) {
	c.log.Debug("net/http complains", "text", firstLine(string(text)))
	return len(text), nil
}

// What waits for a standard error that nobody reads.
const (
	maxUnread   = 500 // lines, of up to 2 KB or so each
	flushWithin = time.Second
)

// lineWriter writes lines in a goroutine of its own, run. A pipe or a journal that nobody reads
// holds up nothing: lines that find no room are left out.
type lineWriter struct {
	to      io.Writer
	lines   chan []byte // nil is the last one
	flushed chan struct{}
	missing atomic.Int64 // lines that were left out, and not logged yet
}

func newLineWriter(to io.Writer) *lineWriter {
	return &lineWriter{to: to, lines: make(chan []byte, maxUnread), flushed: make(chan struct{})}
}

// Write takes one line. It never fails: there is nobody to tell.
func (w *lineWriter) Write(line []byte) (int, error) {
	select {
	case w.lines <- bytes.Clone(line):
	default:
		w.missing.Add(1)
	}
	return len(line), nil
}

// run writes the lines until flush. log, which writes to w, says how many are missing.
func (w *lineWriter) run(log *slog.Logger) {
	for line := range w.lines {
		if line == nil {
			close(w.flushed)
			return
		}
		_, _ = w.to.Write(line)
		if len(w.lines) > 0 {
			continue
		}
		if n := w.missing.Swap(0); n > 0 {
			log.Warn("lines are missing in the log, nobody read it in time", "lines", n)
		}
	}
}

// flush waits until everything is written, but not for long. Later lines are lost.
func (w *lineWriter) flush() {
	late := time.After(flushWithin)
	select {
	case w.lines <- nil:
	case <-late:
		return
	}
	select {
	case <-w.flushed:
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

// maxLines is how many lines with the same message are logged in an hour: very many containers, or
// files, can have the same trouble.
const maxLines = 200

// bounded is a handler that bounds the log, but for what --verbose adds.
type bounded struct {
	slog.Handler
	said *said
}

// said counts lines by their message.
type said struct {
	mu    sync.Mutex
	since time.Time // when the hour began
	lines map[string]int
}

// count counts a line. If an hour is over, it returns the counts of that.
func (s *said) count(message string, now time.Time) (n int, before map[string]int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if now.Sub(s.since) >= time.Hour {
		before = s.lines
		s.since, s.lines = now, map[string]int{}
	}
	s.lines[message]++
	return s.lines[message], before
}

func (b bounded) Handle(ctx context.Context, r slog.Record) error {
	if r.Level < slog.LevelInfo {
		return b.Handler.Handle(ctx, r)
	}
	n, before := b.said.count(r.Message, r.Time)
	for message, lines := range before {
		if lines > maxLines {
			sum := slog.NewRecord(r.Time, slog.LevelWarn, "lines were left out of the log", 0)
			sum.AddAttrs(slog.String("message", message), slog.Int("lines", lines-maxLines))
			_ = b.Handler.Handle(ctx, sum)
		}
	}
	switch {
	case n > maxLines:
		return nil
	case n == maxLines:
		r = r.Clone()
		r.AddAttrs(slog.String("more", "left out for an hour"))
	}
	return b.Handler.Handle(ctx, r)
}

func (b bounded) WithAttrs(attrs []slog.Attr) slog.Handler {
	return bounded{b.Handler.WithAttrs(attrs), b.said}
}

func (b bounded) WithGroup(name string) slog.Handler {
	return bounded{b.Handler.WithGroup(name), b.said}
}
