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
	// maxRow is how many requests are refused in a row until it is asked whether Backstop takes anything at all.
	maxRow = 8
	// maxSamples is how many metrics are asked with for that, where none is known that it took.
	maxSamples = 16
	// growAfter is how many requests are taken until larger ones are tried again.
	growAfter = 64
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

// part is what goes into one request: the places of its metrics in their batch, in order.
type part []int

// split cuts p into parts of up to size metrics each.
func (p part) split(size int) []part { return slices.Collect(slices.Chunk(p, size)) }

// places returns the part that is all of n metrics. It is not to be changed.
func (q *queue) places(n int) part {
	for len(q.ordinal) < n {
		q.ordinal = append(q.ordinal, len(q.ordinal))
	}
	return q.ordinal[:n:n]
}

// content is what a batch holds.
type content struct {
	body    []byte
	count   int      // of its metrics
	metrics []metric // nil until they are wanted one by one
}

// encoded returns the body of a request with part p of what is in c.
func (c *content) encoded(p part, encode func([]metric) []byte) (body []byte, err error) {
	if len(p) == c.count {
		return c.body, nil
	}
	if c.metrics == nil {
		if c.metrics, err = decode(c.body); err != nil {
			return nil, err
		}
	}
	some := make([]metric, len(p))
	for i, place := range p {
		some[i] = c.metrics[place]
	}
	return encode(some), nil
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
		q.inFlight = q.turn()
		if len(q.fresh)+len(q.late) == 0 {
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

// turn returns the first batch that can be read, but for those that were set back; nil if there is none. It is called
// with mu held.
func (q *queue) turn() *batch {
	for _, list := range [][]*batch{q.fresh, q.late} {
		var first *batch
		for _, b := range list {
			if b.body == nil && b.file != "" && !q.spool.isOpen() || first != nil && b.setBack >= first.setBack {
				continue
			}
			if first = b; b.setBack == 0 {
				break
			}
		}
		if first != nil {
			return first
		}
	}
	return nil
}

// send delivers the batch in flight, or what is left of it, and takes it off the queue. On an error it stays.
//
// What is refused because something in it is bad is halved, and its first half tried next, until the bad metrics are alone.
func (q *queue) send(ctx context.Context, b *batch) error {
	start := time.Now()
	c, err := q.load(b)
	if c == nil {
		return err
	}
	parts := b.left.split(q.largest)
	if b.left == nil {
		parts = q.places(c.count).split(q.largest)
	}
	for row := 0; ; {
		if len(parts) == 0 {
			if parts, err = q.reconsider(ctx, b, c); err != nil {
				return err
			}
			if len(parts) == 0 {
				q.delivered(b, c, time.Since(start))
				return nil
			}
		}
		p := parts[0]
		body, err := c.encoded(p, q.to.encode)
		if err != nil {
			return err
		}
		err = q.to.post(ctx, body)
		q.count(b, len(p), err)
		var r *refusal
		switch {
		case err == nil:
			row = 0
			parts = parts[1:]
			q.good = lastOf(body)
			if q.grow() {
				parts = part(slices.Concat(parts...)).split(q.largest)
			}
			continue
		case !errors.As(err, &r) || r.remedy() != halveIt:
			b.keep(parts, c)
			return err
		case len(p) == 1:
			parts = parts[1:]
			b.refused = append(b.refused, p[0])
			b.refusal = r
		case r.status == http.StatusRequestEntityTooLarge:
			q.largest, q.taken = len(p)/2, 0
			parts = part(slices.Concat(parts...)).split(q.largest)
			continue
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
	}
}

// load returns what is in b, or nil, if that cannot be had: without an error if something was done about it.
func (q *queue) load(b *batch) (*content, error) {
	c := &content{body: b.body, count: b.count}
	var err error
	switch {
	case b.body != nil:
	case b.file != "":
		if c, err = q.spool.read(b.file); err != nil {
			return nil, q.unread(b, err)
		}
	default:
		if c.body, err = unpack(b.packed); err != nil {
			return nil, err
		}
	}
	if c.count != b.count { // the name of its file is wrong
		q.mu.Lock()
		q.metrics += c.count - b.metrics
		b.metrics, b.count, b.left, b.refused = c.count, c.count, nil, nil
		q.mu.Unlock()
	}
	return c, nil
}

// unread does what there is to do about b, whose file cannot be read. It returns an error if it should be tried again.
func (q *queue) unread(b *batch, err error) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	var spoilt *spoiltError
	if !errors.As(err, &spoilt) {
		if trouble := q.spool.check(); trouble != nil { // it is not this file's, and may pass
			q.closeSpool(trouble)
			q.inFlight = nil
			return nil
		}
		if !errors.Is(err, fs.ErrNotExist) && !isOurs(err) {
			b.unread++
		}
		if isOurs(err) || 0 < b.unread && b.unread < maxUnread {
			b.setBack++
			return &unreadError{b.file, err}
		}
	}
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
	return nil
}

// unreadError says that a file of the spool could not be read this time.
type unreadError struct {
	file string
	err  error
}

func (e *unreadError) Error() string { return e.err.Error() }

// keep remembers that parts are what is left to be delivered of c.
func (b *batch) keep(parts []part, c *content) {
	b.left = append(part{}, slices.Concat(parts...)...)
	if len(b.left) == c.count {
		b.left = nil
	}
}

// startAgain makes what was refused so far as good as the rest.
func (b *batch) startAgain(c *content) {
	if b.left != nil {
		b.keep([]part{b.left, b.refused}, c)
		slices.Sort(b.left)
	}
	b.refused, b.asked = nil, false
}

// grow counts a request that was taken, and tells whether larger ones should be tried from now on.
func (q *queue) grow() bool {
	if q.largest == maxBatch {
		return false
	}
	if q.taken++; q.taken < growAfter {
		return false
	}
	q.largest, q.taken = min(2*q.largest, maxBatch), 0
	return true
}

// probe finds out whether Backstop takes anything at all, after it has refused some of b. If it does, it is for some metrics that
// it refuses others. If not, it is not one metric or the other that is to blame: all have to be kept, and the error says why.
func (q *queue) probe(ctx context.Context, b *batch, c *content) (err error) {
	if q.good != nil {
		if err = q.to.post(ctx, q.good); err == nil {
			return nil
		}
	} else {
		for _, place := range rand.Perm(c.count)[:min(c.count, maxSamples)] {
			one, bad := c.encoded(part{place}, q.to.encode)
			if bad != nil {
				return bad
			}
			if err = q.to.post(ctx, one); err == nil {
				q.good = one
				return nil
			}
		}
		// Perhaps it takes another batch.
		q.mu.Lock()
		b.setBack++
		q.mu.Unlock()
	}
	q.largest, q.taken = maxBatch, 0
	return err
}

// reconsider is called when everything of b was posted, and returns what has to be posted once more. What was refused
// may have been so because of something that broke down in the midst of it. So it is given up only when it is refused
// for a second time, and others are taken before and after that: else all of it stays, and the error says why.
func (q *queue) reconsider(ctx context.Context, b *batch, c *content) ([]part, error) {
	if len(b.refused) == 0 {
		return nil, nil
	}
	if err := q.probe(ctx, b, c); err != nil {
		b.left = part{}
		b.startAgain(c)
		return nil, err
	}
	if b.asked {
		return nil, nil
	}
	again := b.refused.split(1)
	b.refused, b.asked = nil, true
	return again, nil
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
	if q.outage == nil {
		q.outage = &outage{}
	}
	o := q.outage
	o.failing = true
	text := errorText(err)
	message, attrs := q.to.name+" unreachable, keeping metrics", []any{"since", inUTC(q.late[0].oldest)}
	var (
		r *refusal
		u *unreadError
	)
	switch {
	case errors.As(err, &u):
		message, attrs = "a spooled file cannot be read, and is tried again", []any{"file", u.file}
	case errors.As(err, &r) && r.remedy() != tryAgain:
		message = q.to.name + " refuses metrics, keeping them until that is mended"
	case r != nil:
		message = q.to.name + " fails, keeping metrics"
	}
	if u == nil {
		o.over = q.to.name + " reachable again, metrics that were kept are delivered"
	} else if o.over == "" {
		o.over = "the spool can be read again, metrics that were kept are delivered"
	}
	if o.isNews(text) {
		q.log.Error(message, append(attrs, "error", text)...)
	}
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
