package main

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/journal"
)

// newLogger returns the log, which goes to w.
func newLogger(w io.Writer, level slog.Level) *slog.Logger {
	return slog.New(bounded{newHandler(w, level), new(said)})
}

// newHandler writes lines to w that are short and without secrets.
func newHandler(w io.Writer, level slog.Level) slog.Handler {
	handling := &slog.HandlerOptions{Level: level}
	inJournal, _ := journal.StderrIsJournalStream()
	handling.ReplaceAttr = func(groups []string, a slog.Attr) slog.Attr {
		isOurs := a.Key == slog.TimeKey || a.Key == slog.LevelKey || a.Key == slog.MessageKey
		switch {
		case len(groups) > 0 || !isOurs:
			return fitAttr(a)
		case a.Key == slog.TimeKey && inJournal:
			return slog.Attr{} // the journal has its own
		}
		return a
	}
	return slog.NewTextHandler(w, handling)
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

const (
	// maxUnread bounds the lines that wait to be written, in bytes.
	maxUnread = 1 << 20
	// flushWithin is how long flush waits.
	flushWithin = time.Second
)

// logWriter writes lines in a goroutine of its own, run. A pipe or a journal that nobody reads
// holds up nothing: when too much waits, the oldest lines are left out, and the log says so.
type logWriter struct {
	out  io.Writer
	done chan struct{} // closed when run has ended

	mu      sync.Mutex
	more    *sync.Cond
	waiting []byte // whole lines
	missing int    // lines before them that were left out or not written
	ended   bool   // whether nothing more comes
}

func newLogWriter(out io.Writer) *logWriter {
	w := &logWriter{out: out, done: make(chan struct{})}
	w.more = sync.NewCond(&w.mu)
	return w
}

// Write takes one line. It never fails: there is nobody to tell.
func (w *logWriter) Write(line []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(w.waiting) > 0 && len(w.waiting)+len(line) > maxUnread {
		_, w.waiting, _ = bytes.Cut(w.waiting, []byte("\n"))
		w.missing++
	}
	w.waiting = append(w.waiting, line...)
	w.more.Signal()
	return len(line), nil
}

// run writes lines until flush, the last ones too.
func (w *logWriter) run() {
	defer close(w.done)
	var text bytes.Buffer
	note, isTorn := slog.New(newHandler(&text, slog.LevelWarn)), false
	for ended := false; !ended; {
		text.Reset()
		if isTorn { // the last line was cut off
			text.WriteByte('\n')
		}
		w.mu.Lock()
		for len(w.waiting) == 0 && !w.ended {
			w.more.Wait()
		}
		if w.missing > 0 {
			note.Warn("lines are missing in the log, they could not be written", "lines", w.missing)
		}
		own, missing := text.Len(), w.missing
		text.Write(w.waiting)
		w.waiting, w.missing, ended = nil, 0, w.ended
		w.mu.Unlock()
		n, _ := w.out.Write(text.Bytes())
		if n > 0 {
			isTorn = text.Bytes()[n-1] != '\n'
		}
		if n >= own {
			missing = 0 // the log says so
		}
		w.mu.Lock()
		w.missing += missing + bytes.Count(text.Bytes()[max(n, own):], []byte("\n"))
		w.mu.Unlock()
	}
}

// flush waits until everything is written, but not for long. Later lines are lost.
func (w *logWriter) flush() {
	w.mu.Lock()
	w.ended = true
	w.mu.Unlock()
	w.more.Signal()
	select {
	case <-w.done:
	case <-time.After(flushWithin):
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
