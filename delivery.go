package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/cenkalti/backoff/v5"
)

const (
	// maxRefusals is how many parts of a batch are refused, when none is accepted, until it is
	// clear that the metrics are not to blame.
	maxRefusals = 64
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

// part is what goes into one request.
type part struct {
	body    []byte
	metrics int
}

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
		switch {
		case len(q.fresh) > 0:
			q.inFlight = q.fresh[0]
		case len(q.late) > 0:
			q.inFlight = q.late[0]
		default:
			q.fresh, q.late = nil, nil // lets go of the room that a backlog took
			if q.rest != nil {
				q.rest()
			}
		}
		b := q.inFlight
		q.mu.Unlock()
		if b != nil || closed {
			return b
		}
		select {
		case <-q.changed:
		case <-q.closed:
		}
	}
}

// send delivers the batch in flight, or what is left of it, and takes it off the queue. On an error it stays.
func (q *queue) send(ctx context.Context, b *batch) error {
	start := time.Now()
	parts, err := q.partsOf(b)
	if err != nil {
		if isOurs(err) {
			return fmt.Errorf("spool: %w", err)
		}
		q.spoilt(b, err)
		return nil
	}
	for {
		if len(parts) == 0 {
			if parts, err = q.reconsider(ctx, b); err != nil {
				return err
			}
			if len(parts) == 0 {
				q.delivered(b, time.Since(start))
				return nil
			}
		}
		p := parts[0]
		err := q.to.post(ctx, p.body)
		q.count(b, p, err)
		var r *refusal
		switch {
		case err == nil:
			parts = parts[1:]
			b.good = p
			b.accepted += p.metrics
		case errors.As(err, &r) && r.remedy() == halveIt:
			if parts, err = q.halve(b, parts, r); err != nil {
				return err
			}
		default:
			if b.accepted > 0 || b.refusals > 0 {
				b.parts = parts
			}
			return err
		}
	}
}

// partsOf returns what is left to be delivered of b, in parts that are not too large.
func (q *queue) partsOf(b *batch) (parts []part, err error) {
	whole := part{b.body, b.metrics}
	switch {
	case b.parts != nil:
		return b.parts, nil
	case b.body != nil:
	case b.file != "":
		whole, err = q.spool.read(b.file)
	default:
		whole.body, err = unpack(b.packed)
	}
	if err != nil {
		return nil, err
	}
	return whole.split(q.largest)
}

// split cuts p into parts of up to size metrics each.
func (p part) split(size int) (parts []part, err error) {
	if p.metrics <= size {
		return []part{p}, nil
	}
	metrics, err := decode(p.body)
	for some := range slices.Chunk(metrics, size) {
		parts = append(parts, part{encode(some), len(some)})
	}
	return parts, err
}

// halve puts the halves of the first part, which was refused, behind the others: the good ones are through
// soon, and the number of requests grows with the bad ones only. It returns the refusal where nothing of the batch is
// accepted: then it is not one metric or the other that is to blame.
func (q *queue) halve(b *batch, parts []part, r *refusal) ([]part, error) {
	p, rest := parts[0], parts[1:]
	b.refusals++
	if r.status == http.StatusRequestEntityTooLarge {
		q.largest = max(1, p.metrics/2)
	}
	if p.metrics == 1 {
		b.refused = append(b.refused, p)
		b.refusal = r
	} else {
		halves, err := p.split((p.metrics + 1) / 2)
		if err != nil {
			return nil, err
		}
		rest = append(rest, halves...)
	}
	if b.accepted == 0 && (b.refusals == maxRefusals || len(rest) == 0) {
		b.parts, b.refused, b.refusals, b.asked = nil, nil, 0, false
		q.largest = maxBatch
		return nil, r
	}
	return rest, nil
}

// reconsider is called when everything of b was posted, and returns what has to be posted once more. What was refused
// may have been so because of something that broke down in the midst of it. So it is given up only when it is refused
// for a second time, and a part that was taken is taken again before and after that: else all of it stays, and the
// error says why.
func (q *queue) reconsider(ctx context.Context, b *batch) ([]part, error) {
	again := b.refused
	if len(again) == 0 {
		return nil, nil
	}
	if err := q.to.post(ctx, b.good.body); err != nil {
		b.parts, b.refused, b.asked = again, nil, false
		return nil, err
	}
	if b.asked {
		return nil, nil
	}
	b.refused, b.asked = nil, true
	return again, nil
}

// count keeps the figures of a request with part p of b.
func (q *queue) count(b *batch, p part, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if b.tried {
		q.figures.retried += uint64(p.metrics)
	}
	if err == nil {
		q.figures.sent += uint64(p.metrics)
		return
	}
	b.tried = true
}

// delivered takes b off the queue.
func (q *queue) delivered(b *batch, took time.Duration) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if n := len(b.refused); n > 0 {
		var which []string
		for _, p := range b.refused[:min(n, 10)] {
			which = append(which, string(p.body))
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
	q.log.Debug("delivered", "metrics", b.accepted, "took", took.Round(time.Millisecond), q.state())
}

// spoilt gives up b, whose file cannot be read.
func (q *queue) spoilt(b *batch, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if errors.Is(err, fs.ErrNotExist) {
		if o := q.outage; o == nil || o.isNews("gone") {
			q.log.Error("a file has gone from the spool, and its metrics with it", "file", b.file, "metrics", b.metrics)
		}
	} else {
		q.spool.setAside(file{b.file, b.size}, b.metrics, err)
	}
	b.file = ""
	q.figures.dropped += uint64(b.metrics)
	q.lost += b.metrics
	q.done(b)
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
	message := "metrics of the earlier run are delivered"
	if o.troubled {
		message = q.to.name + " reachable again, metrics that were kept are delivered"
	}
	attrs := []any{"metrics", o.delivered, "last", time.Since(time.Unix(o.oldest, 0)).Round(time.Second)}
	if o.dropped > 0 {
		attrs = append(attrs, "given_up", o.dropped)
		q.room = loss{}
	}
	q.log.Info(message, attrs...)
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
	if q.outage == nil {
		q.outage = &outage{}
	}
	q.outage.failing, q.outage.troubled = true, true
	text := errorText(err)
	if !q.outage.isNews(text) {
		return
	}
	message := q.to.name + " unreachable, keeping metrics"
	var r *refusal
	if errors.As(err, &r) {
		message = q.to.name + " fails, keeping metrics"
		if r.remedy() != tryAgain {
			message = q.to.name + " refuses metrics, keeping them until that is mended"
		}
	}
	q.log.Error(message, "since", inUTC(q.late[0].oldest), "error", text)
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
			what = append(what, "given_up", q.room.metrics)
		}
		q.log.Error("ending without having delivered everything", append(what, "error", trouble)...)
	}
	if n := kept + lost + q.lost; n > 0 {
		return fmt.Errorf("%d metrics not delivered", n)
	}
	return nil
}
