package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
)

const (
	// maxBatch is how many metrics go into one request: Backstop needs 50 ms for them.
	maxBatch = 5_000
	// maxQueued is how many metrics wait at most, some 40 MB: those of 100 containers
	// at a poll a minute for over four hours.
	maxQueued = 500_000
)

// queue stands between sampling and delivery: sampling puts metrics in and never waits,
// deliver hands them to post, oldest first, and keeps what post did not get rid of.
type queue struct {
	post func(context.Context, []metric) error
	log  *slog.Logger

	mu      sync.Mutex
	batches [][]metric    // oldest first
	waiting int           // metrics in batches
	dropped int           // metrics given up for want of room since the last success
	changed chan struct{} // holds one value where there is news for deliver
	closed  chan struct{} // closed once nothing more is put in
}

func newQueue(post func(context.Context, []metric) error, log *slog.Logger) *queue {
	return &queue{post: post, log: log, changed: make(chan struct{}, 1), closed: make(chan struct{})}
}

// put queues metrics. Where there is no room, the oldest are given up.
func (q *queue) put(metrics []metric) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(metrics) > 0 {
		n := min(len(metrics), maxBatch)
		q.batches = append(q.batches, metrics[:n:n])
		q.waiting += n
		metrics = metrics[n:]
	}
	q.bound()
	select {
	case q.changed <- struct{}{}:
	default:
	}
}

// bound gives up the oldest batches until the rest fits.
func (q *queue) bound() {
	for q.waiting > maxQueued {
		if q.dropped == 0 {
			q.log.Error("too many metrics wait to be delivered; from now on the oldest are given up",
				"waiting", q.waiting, "oldest", time.Unix(q.batches[0][0].Time, 0).UTC())
		}
		q.waiting -= len(q.batches[0])
		q.dropped += len(q.batches[0])
		q.batches = q.batches[1:]
	}
}

// take removes the oldest batch and returns it; nil if there is none.
func (q *queue) take() []metric {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.batches) == 0 {
		q.batches = nil // lets go of what was before the first
		return nil
	}
	batch := q.batches[0]
	q.batches = q.batches[1:]
	q.waiting -= len(batch)
	return batch
}

// giveBack undoes a take.
func (q *queue) giveBack(batch []metric) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.batches = append([][]metric{batch}, q.batches...)
	q.waiting += len(batch)
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
// empty. What fails is tried again, after 1 s at first and 1 min in the end; once the queue
// is closed, the first failure ends it. ctx ends it in any case. The error says how many
// metrics were lost in all.
func (q *queue) deliver(ctx context.Context) error {
	var (
		pause   = newBackOff()
		trouble string    // the last one that was logged
		since   time.Time // when it began
		refused int       // metrics that were given up because they will never be taken
	)
	for {
		batch := q.take()
		if batch == nil {
			if q.isClosed() && q.empty() {
				return lossOf(refused, "refused")
			}
			select {
			case <-q.changed:
			case <-q.closed:
			}
			continue
		}
		start := time.Now()
		err := q.post(ctx, batch)
		var refusal *refusal
		switch {
		case err == nil:
			q.log.Debug("delivered", "metrics", len(batch), "took", time.Since(start).Round(time.Millisecond))
			pause.Reset()
			if trouble != "" {
				q.recovered(since, len(batch))
				trouble = ""
			}
		case errors.As(err, &refusal) && refusal.isFinal():
			q.log.Error("metrics refused; they are given up", "metrics", len(batch), "error", errorText(err))
			refused += len(batch)
		default:
			q.giveBack(batch)
			if trouble == "" {
				since = start
			}
			if text := errorText(err); text != trouble {
				trouble = text
				q.log.Error("metrics not delivered; they are kept and sent again", "error", text)
			}
			if q.isClosed() {
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

// recovered logs that deliveries succeed again.
func (q *queue) recovered(since time.Time, delivered int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.log.Info("metrics are delivered again", "failed_for", time.Since(since).Round(time.Second),
		"delivered", delivered, "waiting", q.waiting, "given_up", q.dropped)
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
	lost := q.waiting
	q.batches, q.waiting = nil, 0
	return lost
}

// lossOf is the error of having lost n metrics, nil for none.
func lossOf(n int, how string) error {
	if n == 0 {
		return nil
	}
	return fmt.Errorf("%d metrics %s", n, how)
}
