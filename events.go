package main

import (
	"context"
	"errors"
	"log/slog"
	"time"
)

// events counts what happened to containers between two polls, also to those that were there
// between two polls only.
type events struct {
	log *slog.Logger

	isKnown bool // whether the engine tells events; false before the first answer
	counts  eventCounts
	until   time.Time         // up to when they are counted, by the engine's clock
	heard   map[eventKey]bool // those of the last answer
	news    news
}

type eventCounts [unhealthy + 1]int // by eventKind

const (
	// overlap is how much of what was asked for is asked for again: an event can come into the
	// engine's memory a little after its time.
	overlap = 2 * time.Second
	// maxPast is how far back events are asked for after a failure.
	maxPast = time.Hour
)

// poll asks for what happened from the last time until now, by the engine's clock, and returns what
// is new. The first answer only tells that the engine has answers.
func (es *events) poll(ctx context.Context, e *engine, now time.Time) (fresh []event) {
	first := !es.isKnown
	switch earliest := now.Add(-maxPast); {
	case first || es.until.After(now): // the engine's clock was set back
		es.until = now
	case es.until.Before(earliest):
		es.until = earliest
	}
	// Nothing is worth waiting for: what does not come now comes with the next poll.
	ctx, cancel := context.WithTimeoutCause(ctx, e.timeout/4, noAnswer(e.timeout/4))
	defer cancel()
	all, isOpen, err := e.events(ctx, es.until.Add(-overlap), now)
	es.report(isOpen, err)
	switch {
	case isRefusal(err):
		*es = events{log: es.log, news: es.news}
		return nil
	case err != nil, isOpen && len(all) == 0 && !first: // it may just have been too slow
		return nil
	}
	es.isKnown = true
	heard := make(map[eventKey]bool, len(all))
	for i := range all {
		key := all[i].key()
		if !first && !es.heard[key] && !heard[key] {
			es.counts[all[i].kind()]++
			fresh = append(fresh, all[i])
		}
		heard[key] = true
		if at := time.Unix(0, key.at); at.After(es.until) && at.Before(now) {
			es.until = at
		}
	}
	es.heard = heard
	if !isOpen { // else more may have been on its way
		es.until = now
	}
	return fresh
}

// report logs why there are no events, or why they take time, if that is news.
func (es *events) report(isOpen bool, err error) {
	text := errorText(err)
	if isOpen {
		text = "open"
	}
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
	case isOpen:
		es.log.Info("Docker engine keeps /events open after its answer, closing it at each poll",
			"after", linger)
	}
}

func (es *events) flatten(f *flattener) {
	if es.isKnown {
		f.addCount(".events.start", es.counts[started])
		f.addCount(".events.die", es.counts[ended]+es.counts[failed])
		f.addCount(".events.die_nonzero", es.counts[failed])
		f.addCount(".events.oom", es.counts[killed])
		f.addCount(".events.unhealthy", es.counts[unhealthy])
	}
}
