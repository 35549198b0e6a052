package main

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"time"
)

// events counts what happened to containers between two polls, also to those that were there
// between two polls only.
type events struct {
	log *slog.Logger

	started, ended, failed, killed, unhealthy count // not sent where events are refused

	until time.Time         // up to when the engine was asked, by its clock; zero: never
	seen  map[eventKey]bool // those of the last answer
	news  news
}

const (
	// overlap is how much of what was asked for is asked for again: an event can come into the
	// engine's memory a little after its time.
	overlap = 2 * time.Second
	// maxPast is how far back events are asked for after a failure.
	maxPast = time.Hour
)

// poll asks for what happened from the last time until now, by the engine's clock. It returns the
// ids of containers that are not as they were: started, or given other limits.
func (es *events) poll(ctx context.Context, e *engine, now time.Time) (changed []string) {
	first, since := es.until.IsZero(), es.until
	switch earliest := now.Add(-maxPast); {
	case first || since.After(now): // the engine's clock was set back
		since = now
	case since.Before(earliest):
		since = earliest
	}
	// Nothing is worth waiting for: what does not come now comes with the next poll.
	ctx, cancel := context.WithTimeoutCause(ctx, e.timeout/4, noAnswer(e.timeout/4))
	defer cancel()
	all, err := e.events(ctx, since.Add(-overlap), now)
	es.report(err)
	switch {
	case isRefusal(err):
		*es = events{log: es.log, news: es.news}
		return nil
	case first: // what was before is not counted, but zeros are sent from the beginning
		zero := counted(0)
		es.started, es.ended, es.failed, es.killed, es.unhealthy = zero, zero, zero, zero, zero
	}
	if err != nil && !first {
		return nil
	}
	seen := make(map[eventKey]bool, len(all))
	for i := range all {
		key := all[i].key()
		if isNew := !first && !es.seen[key] && !seen[key]; isNew && es.count(&all[i]) {
			changed = append(changed, key.id)
		}
		seen[key] = true
	}
	es.until, es.seen = now, seen
	return changed
}

// count counts an event. It reports whether its container is not as it was.
func (es *events) count(one *event) (changed bool) {
	switch action := one.key().action; {
	case one.Type != "" && one.Type != "container":
	case action == "start":
		es.started.n++
		return true
	case action == "update":
		return true
	case action == "die" || action == "died":
		es.ended.n++
		if one.failed() {
			es.failed.n++
		}
	case action == "oom":
		es.killed.n++
	case strings.HasPrefix(action, "health_status") && strings.HasSuffix(action, "unhealthy"):
		es.unhealthy.n++
	}
	return false
}

// report logs why there are no events, if that is news.
func (es *events) report(err error) {
	text := errorText(err)
	if errors.Is(err, context.Canceled) || !es.news.isNew(text) {
		return
	}
	switch {
	case isRefusal(err):
		es.log.Warn("Docker engine refuses /events, so <host>.events metrics are missing",
			"error", text)
	case err != nil:
		es.log.Warn("Docker engine does not answer /events, retrying at the next poll",
			"error", text)
	}
}

// flatten adds what was counted since the start.
func (es *events) flatten(f *flattener) {
	f.add(".events.start", es.started)
	f.add(".events.die", es.ended)
	f.add(".events.die_nonzero", es.failed)
	f.add(".events.oom", es.killed)
	f.add(".events.unhealthy", es.unhealthy)
}
