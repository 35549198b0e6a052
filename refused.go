package main

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/http"
	"slices"
	"time"
)

const (
	// maxRow is how many requests are refused in a row until it is asked whether Backstop takes anything at all.
	maxRow = 8
	// maxSamples is how many metrics of a batch are asked with for that, where none is known that it took, and
	// newSamples how many of the newest batch.
	maxSamples, newSamples = 12, 4
	// maxRefused is how many requests are refused while bad metrics are looked for, in refusedIn times the first pause, until
	// that rests and others have their turn.
	maxRefused, refusedIn = 300, 10
	// maxRounds is how often a metric has to be refused until it is given up.
	maxRounds = 3
	// growAfter is how many requests are taken until larger ones are tried again.
	growAfter = 64
)

// part is what goes into one request: the places of its metrics in their batch, in order.
type part []int

// split cuts p into parts of up to size metrics each.
func (p part) split(size int) []part { return slices.Collect(slices.Chunk(p, size)) }

// parts returns what goes into the requests with which the delivery of b goes on.
func (q *queue) parts(b *batch) []part {
	if b.left == nil {
		return q.places(b.count).split(q.largest)
	}
	return b.left.split(q.largest)
}

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
			return nil, &spoiltError{err}
		}
	}
	some := make([]metric, len(p))
	for i, place := range p {
		some[i] = c.metrics[place]
	}
	return encode(some), nil
}

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
	b.refused, b.rounds = nil, 0
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
		if err := q.to.post(ctx, q.good); !isToHalve(err) {
			return err
		}
		q.good = nil // no longer
	}
	if err = q.sample(ctx, c, maxSamples); !isToHalve(err) {
		return err
	}
	if c := q.newest(b); c != nil {
		if err = q.sample(ctx, c, newSamples); !isToHalve(err) {
			return err
		}
	}
	q.largest, q.taken = maxBatch, 0
	q.mu.Lock()
	defer q.mu.Unlock()
	b.setBack++ // perhaps it takes another
	return err
}

// sample posts metrics of c at random, up to most, each on its own, until one is not refused.
func (q *queue) sample(ctx context.Context, c *content, most int) (err error) {
	for _, place := range rand.Perm(c.count)[:min(c.count, most)] {
		one, bad := c.encoded(part{place}, q.to.encode)
		if bad != nil {
			return bad
		}
		if err = q.to.post(ctx, one); err == nil {
			q.good = one
		}
		if !isToHalve(err) {
			return err
		}
	}
	return err
}

// newest returns what is in the batch that was put last, nil if that is b, or cannot be read.
func (q *queue) newest(b *batch) *content {
	q.mu.Lock()
	var newest batch // as it is now: its body may be on its way into a file
	for other := range q.all() {
		if newest = *other; other == b {
			newest = batch{}
		}
	}
	q.mu.Unlock()
	if newest.count == 0 {
		return nil
	}
	c, err := q.open(&newest)
	if err != nil {
		return nil // for its own turn
	}
	return c
}

// settle is called when everything of b was posted in this round, and tells whether it is over with it. What was refused
// may have been so because of something that breaks down now and then. So it is given up only when it was refused in
// several rounds, with a while between them, and others were taken throughout. Where nothing is taken, all of it stays, and
// the error says why.
func (q *queue) settle(ctx context.Context, b *batch, c *content) (over bool, err error) {
	if len(b.refused) == 0 {
		return true, nil
	}
	steady, err := q.isSteady(ctx, b, c)
	if err != nil || !steady {
		b.left = part{}
		b.startAgain(c)
		return false, err
	}
	if b.rounds++; b.rounds == maxRounds {
		return true, nil
	}
	b.left, b.refused = b.refused, nil
	return false, nil
}

// isSteady tells whether Backstop takes what it took before. It asks twice, not to be taken in by something that refuses every
// other request. The error says that it takes nothing.
func (q *queue) isSteady(ctx context.Context, b *batch, c *content) (bool, error) {
	if q.good == nil {
		return true, q.probe(ctx, b, c)
	}
	for range 2 {
		if err := q.to.post(ctx, q.good); isToHalve(err) {
			q.good = nil // perhaps for good, as it ages
			return false, nil
		} else if err != nil {
			return false, err
		}
	}
	return true, nil
}

// refusedOnce counts a request that was refused, and returns how long to wait for the next that may be so.
func (q *queue) refusedOnce() time.Duration {
	now, span := time.Now(), refusedIn*q.pace.first
	if now.Sub(q.refusedSince) > span {
		q.refusedSince, q.refused = now, 0
	}
	if q.refused++; q.refused < maxRefused {
		return 0
	}
	return q.refusedSince.Add(span).Sub(now)
}

// isToHalve tells whether a part of a request is to blame for err, or its size.
func isToHalve(err error) bool {
	var r *refusal
	return errors.As(err, &r) && r.remedy() == halveIt
}

func isTooLarge(err error) bool {
	var r *refusal
	return errors.As(err, &r) && r.status == http.StatusRequestEntityTooLarge
}
