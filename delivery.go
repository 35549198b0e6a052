package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/cenkalti/backoff/v5"
)

const (
	// maxUnread is how often it is tried to read a file.
	maxUnread = 3
	// maxTold is how many different troubles of one outage are logged.
	maxTold = 10
)

// destination is where metrics are delivered to.
type destination struct {
	name   string // for the log
	encode func([]metric) []byte
	post   func(ctx context.Context, body []byte) error
}

// pace is how long deliver waits after a failure.
type pace struct {
	first, longest time.Duration // where trying again is all there is to do: exponential, with jitter
	mend           time.Duration // where somebody has something to mend
}

var usualPace = pace{time.Second, time.Minute, time.Minute}

// close lets deliver end.
func (q *queue) close() { close(q.closed) }

func (q *queue) isClosed() bool {
	select {
	case <-q.closed:
		return true
	default:
		return false
	}
}

// deliver posts what is in the queue, one request at a time, until the queue is closed and
// empty. What fails is tried again; a try that was begun after the queue was closed and fails is the last. ctx ends
// it in any case. The error says how many metrics were not delivered.
func (q *queue) deliver(ctx context.Context) error {
	wait := backoff.NewExponentialBackOff()
	wait.InitialInterval, wait.MaxInterval, wait.Multiplier = q.pace.first, q.pace.longest, 2
	for {
		b := q.next()
		if b == nil {
			return q.end("")
		}
		last := q.isClosed()
		err := q.send(ctx, b)
		if err == nil {
			wait.Reset()
			continue
		}
		q.failed(err)
		if last || ctx.Err() != nil {
			return q.end(errorText(err))
		}
		select {
		case <-time.After(q.pause(err, wait)):
		case <-q.closed:
		}
	}
}

// next waits for the batch whose turn it is. It returns nil when there will be none any more.
func (q *queue) next() *batch {
	for {
		closed := q.isClosed() // asked first: whatever was put before is seen below
		q.mu.Lock()
		if closed && !q.ending {
			q.ending = true
			for b := range q.all() {
				b.rests = time.Time{} // there is no later
			}
		}
		b, wait := q.turn()
		q.inFlight = b
		empty := len(q.fresh)+len(q.late) == 0
		if empty {
			q.fresh, q.late = nil, nil // lets go of the room that a backlog took
		}
		q.mu.Unlock()
		if empty && q.rest != nil {
			q.rest()
		}
		if b != nil || closed {
			return b
		}
		var rested <-chan time.Time
		if wait > 0 {
			rested = time.After(wait)
		}
		select {
		case <-q.changed:
		case <-q.closed:
		case <-rested:
		}
	}
}

// turn returns the first batch that can be read and does not rest, but for those that were set back. Where there is none, b is nil, and
// wait is how long it takes until one is rested, 0 if none rests. It is called with mu held.
func (q *queue) turn() (b *batch, wait time.Duration) {
	now := time.Now()
	for _, list := range [][]*batch{q.fresh, q.late} {
		var first *batch
		for _, b := range list {
			if b.body == nil && b.file != "" && !q.spool.isOpen() {
				continue
			}
			if rest := b.rests.Sub(now); rest > 0 {
				if wait == 0 || rest < wait {
					wait = rest
				}
				continue
			}
			if first == nil || b.setBack < first.setBack {
				first = b
			}
			if b.setBack == 0 {
				break
			}
		}
		if first != nil {
			return first, 0
		}
	}
	return nil, wait
}

// letRest lets others go before b for so long.
func (q *queue) letRest(b *batch, d time.Duration) {
	q.mu.Lock()
	defer q.mu.Unlock()
	b.rests = time.Now().Add(d)
}

// send delivers the batch in flight, or what is left of it, and takes it off the queue. Where it has to be tried again,
// it stays: after a rest of its own, while others are delivered, or, on an error, after a pause for all.
//
// What is refused because something in it is bad is halved, and its first half tried next, until the bad metrics are alone.
func (q *queue) send(ctx context.Context, b *batch) error {
	start := time.Now()
	c := q.load(b)
	if c == nil {
		return nil
	}
	if b.rounds > 0 && len(b.refused) == 0 { // a round begins
		if steady, err := q.isSteady(ctx, b, c); err != nil || !steady {
			b.startAgain(c)
			q.letRest(b, q.pace.mend)
			return err
		}
	}
	parts := q.parts(b)
	for row := 0; ; {
		if len(parts) == 0 {
			over, err := q.settle(ctx, b, c)
			switch {
			case err != nil:
				return err
			case over:
				q.delivered(b, c, time.Since(start))
				return nil
			case !q.isClosed():
				q.letRest(b, q.pace.mend)
				return nil
			}
			parts = q.parts(b)
		}
		p := parts[0]
		body, err := c.encoded(p, q.to.encode)
		if err != nil {
			q.unread(b, err)
			return nil
		}
		err = q.to.post(ctx, body)
		q.count(b, len(p), err)
		switch {
		case err == nil:
			row = 0
			parts = parts[1:]
			q.good = lastOf(body)
			if q.grow() {
				parts = part(slices.Concat(parts...)).split(q.largest)
			}
			continue
		case !isToHalve(err):
			b.keep(parts, c)
			return err
		case len(p) == 1:
			parts = parts[1:]
			b.refused = append(b.refused, p[0])
			b.refusal = err
		case isTooLarge(err):
			q.largest, q.taken = len(p)/2, 0
			parts = part(slices.Concat(parts...)).split(q.largest)
			continue
		case b.rounds > 0: // most of these are bad
			parts = slices.Replace(parts, 0, 1, p.split(1)...)
		default:
			parts = slices.Replace(parts, 0, 1, p.split((len(p)+1)/2)...)
		}
		if row++; row%maxRow == 0 {
			if err := q.probe(ctx, b, c); err != nil {
				b.keep(parts, c)
				b.startAgain(c)
				return err
			}
		}
		if wait := q.refusedOnce(); wait > 0 && !q.isClosed() {
			b.keep(parts, c)
			q.letRest(b, wait)
			return nil
		}
	}
}

// load returns what is in b, or nil, if that cannot be had, and something was done about it.
func (q *queue) load(b *batch) *content {
	c, err := q.open(b)
	if err != nil {
		q.unread(b, err)
		return nil
	}
	if c.count != b.count { // the name of its file is wrong
		q.mu.Lock()
		defer q.mu.Unlock()
		q.metrics += c.count - b.metrics
		b.metrics, b.count, b.left, b.refused = c.count, c.count, nil, nil
	}
	return c
}

// open returns what is in b.
func (q *queue) open(b *batch) (*content, error) {
	switch {
	case b.body != nil:
		return &content{body: b.body, count: b.count}, nil
	case b.file != "":
		return q.spool.read(b.file)
	}
	body, err := unpack(b.packed)
	return &content{body: body, count: b.count}, err
}

// unread does what there is to do about b, which cannot be read.
func (q *queue) unread(b *batch, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	var spoilt *spoiltError
	if b.file != "" && !errors.As(err, &spoilt) {
		trouble := q.spool.check()
		if trouble == nil && isOurs(err) {
			trouble = err
		}
		if trouble != nil { // it is not this file's, and may pass
			q.closeSpool(trouble)
			return
		}
		if !errors.Is(err, fs.ErrNotExist) {
			if b.unread++; b.unread < maxUnread {
				b.rests = time.Now().Add(q.pace.mend)
				return
			}
		}
	}
	switch o := q.outage; {
	case b.file == "":
		q.log.Error("metrics in memory cannot be read; they are given up", "metrics", b.metrics, "error", errorText(err))
	case !errors.Is(err, fs.ErrNotExist):
		q.spool.setAside(file{b.file, b.size}, b.metrics, err)
	case o == nil || o.isNews("gone"):
		q.log.Error("a file has gone from the spool, and its metrics with it", "file", b.file, "metrics", b.metrics)
	}
	b.file = ""
	q.figures.dropped += uint64(b.metrics)
	q.lost += b.metrics
	q.done(b)
}

// count keeps the figures of a request with so many metrics of b.
func (q *queue) count(b *batch, metrics int, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if b.tried {
		q.figures.retried += uint64(metrics)
	}
	if err != nil {
		b.tried = true
		return
	}
	q.figures.sent += uint64(metrics)
	q.metrics -= metrics
	b.metrics -= metrics
	b.accepted += metrics
}

// delivered takes b off the queue.
func (q *queue) delivered(b *batch, c *content, took time.Duration) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if n := len(b.refused); n > 0 {
		var which []string
		for _, place := range b.refused[:min(n, 10)] {
			one, _ := c.encoded(part{place}, q.to.encode) // it was posted before
			which = append(which, string(one))
		}
		q.log.Error("metrics refused; they are given up", "metrics", n, "such_as", strings.Join(which, " "), "error", errorText(b.refusal))
		q.figures.dropped += uint64(n)
		q.lost += n
	}
	if o := q.outage; o != nil {
		o.failing = false
		o.delivered += b.accepted
		if o.oldest == 0 || b.oldest < o.oldest {
			o.oldest = b.oldest
		}
	}
	q.done(b)
	for b := range q.all() {
		b.setBack = 0 // it may be as good as the one that was taken
	}
	q.log.Debug("delivered", "metrics", b.accepted, "took", took.Round(time.Millisecond), q.state())
}

// done takes the batch in flight off the queue, and tells when an outage is over with it. It is called with mu held.
func (q *queue) done(b *batch) {
	q.inFlight = nil
	q.leave(b)
	if q.outage == nil || q.outage.failing || len(q.late) > 0 {
		return
	}
	o := q.outage
	q.outage = nil
	if o.delivered == 0 {
		return // there were only files of no use
	}
	attrs := []any{"metrics", o.delivered, "last", time.Since(time.Unix(o.oldest, 0)).Round(time.Second)}
	if o.dropped.metrics > 0 {
		attrs = append(attrs, o.dropped.attr())
		q.room = loss{} // told herewith
	}
	q.log.Info(o.over, attrs...)
}

// failed makes everything late, and logs what is the trouble.
func (q *queue) failed(err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.inFlight = nil
	for _, b := range q.fresh {
		q.pack(b)
		b.body = nil // its turn does not come at once
	}
	q.late = append(q.late, q.fresh...)
	q.fresh = nil
	o := q.inOutage(q.to.name + " reachable again, metrics that were kept are delivered")
	o.failing = true
	text := errorText(err)
	message, attrs := q.to.name+" unreachable, keeping metrics", []any{"since", inUTC(q.late[0].oldest)}
	var r *refusal
	switch {
	case errors.As(err, &r) && r.remedy() != tryAgain:
		message = q.to.name + " refuses metrics, keeping them until that is mended"
	case r != nil:
		message = q.to.name + " fails, keeping metrics"
	}
	if o.isNews(text) {
		q.log.Error(message, append(attrs, "error", text)...)
	}
}

// inOutage returns the outage that there is now, and what is to be logged when it is over. It is called with mu held.
func (q *queue) inOutage(over string) *outage {
	if q.outage == nil {
		q.outage = &outage{dropped: q.room} // what is not told yet will be with it
	}
	q.outage.over = over
	return q.outage
}

// isNews tells whether something has not been told yet in this outage, and has to be.
func (o *outage) isNews(text string) bool {
	if slices.Contains(o.told, text) || len(o.told) >= maxTold {
		return false
	}
	o.told = append(o.told, text)
	return true
}

// pause returns how long to wait after a failure.
func (q *queue) pause(err error, wait backoff.BackOff) time.Duration {
	var r *refusal
	if !errors.As(err, &r) {
		return wait.NextBackOff()
	}
	if r.remedy() != tryAgain {
		return q.pace.mend
	}
	pause := wait.NextBackOff()
	if r.retryAfter > 0 { // not everybody at once then
		pause = max(pause, r.retryAfter+rand.N(q.pace.first))
	}
	return pause
}

// end says what becomes of the metrics that were not delivered, if there are any.
func (q *queue) end(trouble string) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.inFlight = nil
	q.store() // what the disk did not take before
	kept, lost := 0, 0
	for b := range q.all() {
		if b.file == "" {
			lost += b.metrics
		} else {
			kept += b.metrics
		}
	}
	if q.spool != nil {
		q.spool.close()
	}
	if kept+lost > 0 {
		var what []any
		if lost > 0 {
			what = append(what, "lost", lost)
		}
		if kept > 0 {
			what = append(what, "kept", kept, "spool", q.spool.dir)
		}
		if q.room.metrics > 0 {
			what = append(what, q.room.attr())
		}
		q.log.Error("ending without having delivered everything", append(what, "error", trouble)...)
	}
	if n := kept + lost + q.lost; n > 0 {
		return fmt.Errorf("%d metrics not delivered", n)
	}
	return nil
}
