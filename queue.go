package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
)

const (
	// maxBatch is how many metrics go into one request: Backstop needs 50 ms for them.
	maxBatch = 5_000
	// maxQueued is how many bytes of encoded metrics wait at most. At some 90 bytes each and 40 of a
	// container, that is six hours of 100 containers at a poll a minute.
	maxQueued = 128 << 20
)

// destination is where metrics are delivered to.
type destination struct {
	encode func([]metric) []byte
	post   func(ctx context.Context, body []byte) error
}

// queue stands between sampling and delivery: sampling puts metrics in and never waits,
// deliver hands them to post, oldest first, and keeps what post did not get rid of.
type queue struct {
	to  destination
	log *slog.Logger

	mu      sync.Mutex
	batches []batch       // oldest first
	bytes   int           // in batches
	dropped int           // metrics given up for want of room since the last success
	figures figures       // since the start
	changed chan struct{} // holds one value where there is news for deliver
	closed  chan struct{} // closed once nothing more is put in
}

// batch is what goes into one request.
type batch struct {
	body    []byte
	metrics int
	oldest  int64 // Unix seconds
	tried   bool  // without success
}

// figures counts metrics.
type figures struct{ sent, retried, dropped uint64 }

func newQueue(to destination, log *slog.Logger) *queue {
	return &queue{to: to, log: log, changed: make(chan struct{}, 1), closed: make(chan struct{})}
}

// own returns the metrics of the queue itself, of the host with that name in its metrics.
func (q *queue) own(host string, at time.Time) []metric {
	q.mu.Lock()
	defer q.mu.Unlock()
	now := at.Unix()
	return []metric{
		{host + ".metrics.sent", whole(q.figures.sent), now},
		{host + ".metrics.retried", whole(q.figures.retried), now},
		{host + ".metrics.dropped", whole(q.figures.dropped), now},
		{host + ".metrics.spooled", whole(uint64(q.bytes)), now},
	}
}

// put queues metrics. Where there is no room, the oldest are given up.
func (q *queue) put(metrics []metric) {
	var batches []batch
	for part := range slices.Chunk(metrics, maxBatch) {
		oldest := slices.MinFunc(part, func(a, b metric) int { return cmp.Compare(a.time, b.time) }).time
		batches = append(batches, batch{body: q.to.encode(part), metrics: len(part), oldest: oldest})
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, b := range batches {
		q.batches = append(q.batches, b)
		q.bytes += len(b.body)
	}
	q.bound()
	select {
	case q.changed <- struct{}{}:
	default:
	}
}

// bound gives up the oldest batches until the rest fits.
func (q *queue) bound() {
	for q.bytes > maxQueued {
		oldest := q.batches[0]
		if q.dropped == 0 {
			q.log.Error("too many metrics wait to be delivered; from now on the oldest are given up",
				"bytes", q.bytes, "oldest", time.Unix(oldest.oldest, 0).UTC())
		}
		q.bytes -= len(oldest.body)
		q.dropped += oldest.metrics
		q.figures.dropped += uint64(oldest.metrics)
		q.batches = q.batches[1:]
	}
}

// take removes the oldest batch and returns it; ok is false if there is none.
func (q *queue) take() (b batch, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.batches) == 0 {
		q.batches = nil // lets go of what was before the first
		return batch{}, false
	}
	b = q.batches[0]
	q.batches = q.batches[1:]
	q.bytes -= len(b.body)
	return b, true
}

// giveBack undoes a take.
func (q *queue) giveBack(b batch) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.batches = slices.Insert(q.batches, 0, b)
	q.bytes += len(b.body)
	q.bound()
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

// deliver posts what is in the queue, one batch at a time, until the queue is closed and
// empty. What fails is tried again, after 1 s at first and 1 min in the end; a try that was
// begun after the queue was closed and fails is the last. ctx ends it in any case. The error says
// how many metrics were lost in all.
func (q *queue) deliver(ctx context.Context) error {
	var (
		pause   = newBackOff()
		trouble string    // the last one that was logged
		since   time.Time // when it began
		refused int       // metrics that were given up because they will never be taken
	)
	for {
		batch, ok := q.take()
		if !ok {
			if q.isClosed() && q.empty() {
				return lossOf(refused, "refused")
			}
			select {
			case <-q.changed:
			case <-q.closed:
			}
			continue
		}
		start, last := time.Now(), q.isClosed()
		err := q.to.post(ctx, batch.body)
		var refusal *refusal
		final := errors.As(err, &refusal) && refusal.isFinal()
		q.count(batch, err == nil, final)
		switch {
		case err == nil:
			q.log.Debug("delivered", "metrics", batch.metrics, "took", time.Since(start).Round(time.Millisecond))
			pause.Reset()
			if trouble != "" {
				q.recovered(since, batch.metrics)
				trouble = ""
			}
		case final:
			q.log.Error("metrics refused; they are given up", "metrics", batch.metrics, "error", errorText(err))
			refused += batch.metrics
		default:
			batch.tried = true
			q.giveBack(batch)
			if trouble == "" {
				since = start
			}
			if text := errorText(err); text != trouble {
				trouble = text
				q.log.Error("metrics not delivered", "error", text)
			}
			if last || ctx.Err() != nil {
				lost := q.abandon()
				q.log.Error("ending without having delivered everything", "lost", lost, "error", trouble)
				return lossOf(lost+refused, "not delivered")
			}
			select {
			case <-time.After(pause.NextBackOff()):
			case <-q.closed:
			}
		}
	}
}

func newBackOff() *backoff.ExponentialBackOff {
	b := backoff.NewExponentialBackOff()
	b.InitialInterval, b.MaxInterval, b.Multiplier = time.Second, time.Minute, 2
	return b
}

// count keeps the figures of a try to deliver b.
func (q *queue) count(b batch, sent, dropped bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	n := uint64(b.metrics)
	if b.tried {
		q.figures.retried += n
	}
	switch {
	case sent:
		q.figures.sent += n
	case dropped:
		q.figures.dropped += n
	}
}

// recovered logs that deliveries succeed again.
func (q *queue) recovered(since time.Time, delivered int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.log.Info("metrics are delivered again", "failed_for", time.Since(since).Round(time.Second),
		"delivered", delivered, "waiting", q.waiting(), "given_up", q.dropped)
	q.dropped = 0
}

func (q *queue) empty() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.batches) == 0
}

// abandon empties the queue and returns how many metrics were in it.
func (q *queue) abandon() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	lost := q.waiting()
	q.batches, q.bytes = nil, 0
	return lost
}

// waiting returns how many metrics are in the queue. It is called with mu held.
func (q *queue) waiting() int {
	n := 0
	for _, b := range q.batches {
		n += b.metrics
	}
	return n
}

// lossOf is the error of having lost n metrics, nil for none.
func lossOf(n int, how string) error {
	if n == 0 {
		return nil
	}
	return fmt.Errorf("%d metrics %s", n, how)
}
