package main

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"time"
)

// events counts what happened to containers between two polls, also to those that were there
// between two polls only.
type events struct {
	log *slog.Logger

	started, ended, failed, killed, unhealthy count

	until  time.Time         // up to when the engine was asked, by its clock
	asked  time.Time         // when that was, by ours
	broken time.Time         // since when answers could not be read, zero if they can
	seen   map[eventKey]bool // the last ones
	order  []eventKey        // the same, oldest first
	news   news
}

// eventKey tells one event from all others.
type eventKey struct {
	id, action string
	at         int64 // Unix ns
}

const (
	// overlap is how much of what was asked for is asked for again: an event can come into the
	// engine's memory a little after its time.
	overlap = 2 * time.Second
	// minSeen is how many events are remembered at least. Docker's memory has 256, so none is
	// taken for new that is still in there.
	minSeen = 1024
	// maxBroken is for how long events whose answers cannot be read are asked for again.
	maxBroken = 10 * time.Minute
	// maxKey bounds id and action of an event, in bytes. Real ones have less than 100.
	maxKey = 256
)

// poll asks for what happened since the last time. It returns the ids of containers that are not
// as they were: started, or given other limits.
func (es *events) poll(ctx context.Context, e *engine) (changed []string) {
	now := time.Now()
	until := e.clock.at(now)
	first := es.until.IsZero()
	since := until
	if !first {
		// The engine's clock may have been set back since the last time.
		since = until.Add(-now.Sub(es.asked))
		if es.until.Before(since) {
			since = es.until
		}
	}
	// Nothing is worth waiting for: what does not come now comes with the next poll.
	ctx, cancel := context.WithTimeoutCause(ctx, e.timeout/4, noAnswer(e.timeout/4))
	defer cancel()
	all, err := e.events(ctx, since.Add(-overlap), until)
	es.report(err)
	switch {
	case isRefusal(err):
		log := es.log
		*es = events{log: log, news: es.news}
		return nil
	case first: // what was before is not counted, but zeros are sent from the beginning
		for _, counter := range es.counters() {
			*counter.count = counted(0)
		}
	case errors.As(err, new(rubbish)):
		if es.broken.IsZero() {
			es.broken = now
		}
		if now.Sub(es.broken) < maxBroken {
			return nil
		}
		// Too many, most likely: asking for ever more would not help.
	case err != nil:
		return nil
	}
	es.until, es.asked, es.broken = until, now, time.Time{}
	for i := range all {
		if id := es.take(&all[i], !first); id != "" {
			changed = append(changed, id)
		}
	}
	tooMany := max(len(es.order)-max(minSeen, len(all)), 0) // all may be in the next answer, too
	for _, key := range es.order[:tooMany] {
		delete(es.seen, key)
	}
	es.order = slices.Delete(es.order, 0, tooMany)
	return changed
}

// take counts an event that was not seen before. It returns the id of a container that has
// changed, else "".
func (es *events) take(one *event, counts bool) (changed string) {
	action := cmp.Or(one.Action, one.Status)
	key := eventKey{cmp.Or(one.Actor.ID, one.ID), action, one.TimeNano}
	isOther := one.Type != "" && one.Type != "container"
	if isOther || len(key.id)+len(action) > maxKey || es.seen[key] {
		return ""
	}
	if es.seen == nil {
		es.seen = map[eventKey]bool{}
	}
	es.seen[key] = true
	es.order = append(es.order, key)
	if !counts {
		return ""
	}
	switch action {
	case "start":
		es.started.n++
		return key.id
	case "update":
		return key.id
	case "die", "died":
		es.ended.n++
		if one.failed() {
			es.failed.n++
		}
	case "oom":
		es.killed.n++
	default:
		if strings.HasPrefix(action, "health_status") && strings.HasSuffix(action, "unhealthy") {
			es.unhealthy.n++
		}
	}
	return ""
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

type eventCounter struct {
	name string
	*count
}

func (es *events) counters() [5]eventCounter {
	return [...]eventCounter{
		{".events.start", &es.started},
		{".events.die", &es.ended},
		{".events.die_nonzero", &es.failed},
		{".events.oom", &es.killed},
		{".events.unhealthy", &es.unhealthy},
	}
}

// flatten adds what was counted since the start; nothing where events are refused.
func (es *events) flatten(f *flattener) {
	for _, counter := range es.counters() {
		f.add(counter.name, *counter.count)
	}
}
