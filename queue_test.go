package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// points returns n metrics whose values tell them apart.
func points(from, n int) []metric {
	metrics := make([]metric, n)
	for i := range metrics {
		metrics[i] = metric{"web.a", uint64(from + i), 1795409680}
	}
	return metrics
}

// receiver takes metrics, and fails as it is told.
type receiver struct {
	fail  func(attempt int) error
	tries int
	at    []time.Duration // of the tries
	start time.Time
	sizes []int
	got   []metric
}

func (r *receiver) post(_ context.Context, metrics []metric) error {
	if r.start.IsZero() {
		r.start = time.Now()
	}
	r.tries++
	r.at = append(r.at, time.Since(r.start))
	if r.fail != nil {
		if err := r.fail(r.tries); err != nil {
			return err
		}
	}
	r.sizes = append(r.sizes, len(metrics))
	r.got = append(r.got, metrics...)
	return nil
}

// inOrder tells whether r got the points from to to-1, each once, oldest first.
func (r *receiver) inOrder(t *testing.T, from, to int) {
	t.Helper()
	if len(r.got) != to-from {
		t.Errorf("%d metrics arrived, want %d", len(r.got), to-from)
		return
	}
	for i, m := range r.got {
		if m.Value != uint64(from+i) {
			t.Errorf("metric %d arrived in the place of %d", m.Value, from+i)
			return
		}
	}
}

func TestQueueDeliversInBatches(t *testing.T) {
	r, log := &receiver{}, &logged{}
	q := newQueue(r.post, log.logger())
	q.put(nil)
	q.put(points(0, 12_001))
	q.put(points(12_001, 3))
	q.close()
	if err := q.deliver(t.Context()); err != nil {
		t.Error(err)
	}
	r.inOrder(t, 0, 12_004)
	if got := fmt.Sprint(r.sizes); got != "[5000 5000 2001 3]" {
		t.Errorf("requests of %s", got)
	}
	if got := log.take(); got != "" {
		t.Errorf("logged %s", got)
	}
}

// Sampling goes on while nothing can be delivered, and nothing is lost nor out of order.
func TestQueueOutlastsAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, log := &receiver{}, &logged{}
		begin := time.Now()
		r.fail = func(int) error {
			if time.Since(begin) < 10*time.Minute {
				return errors.New("connection refused")
			}
			return nil
		}
		q := newQueue(r.post, log.logger())
		done := make(chan error)
		go func() { done <- q.deliver(t.Context()) }()
		for i := range 20 {
			q.put(points(i*10, 10))
			time.Sleep(time.Minute)
		}
		q.close()
		if err := <-done; err != nil {
			t.Error(err)
		}
		r.inOrder(t, 0, 200)
		// Exponential with jitter, from 1 s to 1 min: not thousands of tries, and none that waits for long.
		if r.tries < 20+10 || r.tries > 20+40 {
			t.Errorf("%d tries", r.tries)
		}
		for i := 1; i < len(r.at); i++ {
			if pause := r.at[i] - r.at[i-1]; pause > 90*time.Second {
				t.Errorf("a pause of %s", pause)
			}
		}
		want := `level=ERROR msg="metrics not delivered; they are kept and sent again" error="connection refused"
level=INFO msg="metrics are delivered again" failed_for=1`
		if got := log.take(); !strings.HasPrefix(got, want) || strings.Count(got, "\n") != 2 || !strings.Contains(got, "given_up=0") {
			t.Errorf("logged\n%swant\n%s", got, want)
		}
	})
}

func TestQueueGivesUpWhatIsRefusedForEver(t *testing.T) {
	r, log := &receiver{}, &logged{}
	r.fail = func(try int) error {
		if try == 1 {
			return &refusal{status: 400, line: "missing fields"}
		}
		return nil
	}
	q := newQueue(r.post, log.logger())
	q.put(points(0, 7))
	q.put(points(7, 3))
	q.close()
	if err := q.deliver(t.Context()); err == nil || err.Error() != "7 metrics refused" {
		t.Errorf("error %v", err)
	}
	r.inOrder(t, 7, 10)
	if got, want := log.take(), `level=ERROR msg="metrics refused; they are given up" metrics=7 error="answer 400 Bad Request: missing fields"`+"\n"; got != want {
		t.Errorf("logged\n%swant\n%s", got, want)
	}
}

func TestQueueIsBounded(t *testing.T) {
	log := &logged{}
	r := &receiver{}
	q := newQueue(r.post, log.logger())
	for i := range 3 * maxQueued / maxBatch / 2 {
		q.put(points(i*maxBatch, maxBatch))
	}
	if got := log.take(); strings.Count(got, "\n") != 1 || !strings.Contains(got, `msg="too many metrics wait to be delivered; from now on the oldest are given up" waiting=505000 oldest=2026-11-23T04:54:40.000Z`) {
		t.Errorf("logged %s", got)
	}
	// A batch that comes back from a failed try is the oldest, so it is the one without room.
	taken := q.take()
	q.put(points(3*maxQueued/2, maxBatch))
	q.giveBack(taken)
	q.close()
	if err := q.deliver(t.Context()); err != nil {
		t.Error(err)
	}
	r.inOrder(t, maxQueued/2+maxBatch, 3*maxQueued/2+maxBatch)
}

// Once closed, there is one try for each batch, and the loss is told in figures.
func TestQueueEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, log := &receiver{}, &logged{}
		r.fail = func(int) error { return errors.New("connection refused") }
		q := newQueue(r.post, log.logger())
		done := make(chan error)
		go func() { done <- q.deliver(t.Context()) }()
		q.put(points(0, 10))
		time.Sleep(10 * time.Minute) // until it waits for its next try for a minute or so
		q.put(points(10, 5))
		tries, closed := r.tries, time.Now()
		q.close()
		if err := <-done; err == nil || err.Error() != "15 metrics not delivered" {
			t.Errorf("error %v", err)
		}
		if r.tries != tries+1 || time.Since(closed) != 0 {
			t.Errorf("%d more tries in %s", r.tries-tries, time.Since(closed))
		}
		if got := log.take(); !strings.Contains(got, `level=ERROR msg="ending without having delivered everything" lost=15 error="connection refused"`) {
			t.Errorf("logged\n%s", got)
		}
	})
}
