package main

import (
	"context"
	"encoding/json"
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
		metrics[i] = metric{"web.a", whole(uint64(from + i)), 1795409680}
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
	got   []int // the values
}

func (r *receiver) destination() destination { return destination{encode, r.post} }

func (r *receiver) post(_ context.Context, body []byte) error {
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
	var items []struct{ Value int }
	if err := json.Unmarshal(body, &items); err != nil {
		return err
	}
	r.sizes = append(r.sizes, len(items))
	for _, item := range items {
		r.got = append(r.got, item.Value)
	}
	return nil
}

// inOrder tells whether r got the points from to to-1, each once, oldest first.
func (r *receiver) inOrder(t *testing.T, from, to int) {
	t.Helper()
	if len(r.got) != to-from {
		t.Errorf("%d metrics arrived, want %d", len(r.got), to-from)
		return
	}
	for i, value := range r.got {
		if value != from+i {
			t.Errorf("metric %d arrived in the place of %d", value, from+i)
			return
		}
	}
}

func TestQueueDeliversInBatches(t *testing.T) {
	r, log := &receiver{}, &logged{}
	q := newQueue(r.destination(), log.logger())
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
		q := newQueue(r.destination(), log.logger())
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
		if got, want := asLines(q.own("h", time.Unix(1, 0))), fmt.Sprintf("h.metrics.sent 200 1\nh.metrics.retried %d 1\n", 10*(r.tries-20)); !strings.HasPrefix(got, want) {
			t.Errorf("its own figures are\n%s, after %d tries", got, r.tries)
		}
		// Exponential with jitter, from 1 s to 1 min: not thousands of tries, and none that waits for long.
		if r.tries < 20+10 || r.tries > 20+40 {
			t.Errorf("%d tries", r.tries)
		}
		for i := 1; i < len(r.at); i++ {
			if pause := r.at[i] - r.at[i-1]; pause > 90*time.Second {
				t.Errorf("a pause of %s", pause)
			}
		}
		want := `level=ERROR msg="metrics not delivered" error="connection refused"
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
	q := newQueue(r.destination(), log.logger())
	q.put(points(0, 7))
	q.put(points(7, 3))
	q.close()
	if err := q.deliver(t.Context()); err == nil || err.Error() != "7 metrics refused" {
		t.Errorf("error %v", err)
	}
	if got, want := asLines(q.own("h", time.Unix(1, 0))), "h.metrics.sent 3 1\nh.metrics.retried 0 1\nh.metrics.dropped 7 1\nh.metrics.spooled 0 1\n"; got != want {
		t.Errorf("its own figures are\n%s", got)
	}
	r.inOrder(t, 7, 10)
	if got, want := log.take(), `level=ERROR msg="metrics refused; they are given up" metrics=7 error="answer 400 Bad Request: missing fields"`+"\n"; got != want {
		t.Errorf("logged\n%swant\n%s", got, want)
	}
}

func TestQueueIsBounded(t *testing.T) {
	log := &logged{}
	r := &receiver{}
	q := newQueue(r.destination(), log.logger())
	fit := maxQueued / len(encode(points(1_000_000, maxBatch))) // batches
	const first = 1_000_000                                     // so that all have as many digits
	for i := range fit + 10 {
		q.put(points(first+i*maxBatch, maxBatch))
	}
	if got := log.take(); strings.Count(got, "\n") != 1 || !strings.Contains(got, `msg="too many metrics wait to be delivered; from now on the oldest are given up" bytes=`) || !strings.Contains(got, "oldest=2026-11-23T04:54:40.000Z") {
		t.Errorf("logged %s", got)
	}
	// A batch that comes back from a failed try is the oldest, so it is the one without room.
	taken, _ := q.take()
	q.put(points(first+(fit+10)*maxBatch, maxBatch))
	q.giveBack(taken)
	if own := asLines(q.own("h", time.Unix(1795409680, 0))); !strings.Contains(own, fmt.Sprintf("h.metrics.dropped %d ", 11*maxBatch)) || !strings.Contains(own, "h.metrics.spooled 13") {
		t.Errorf("its own figures are\n%s", own)
	}
	q.close()
	if err := q.deliver(t.Context()); err != nil {
		t.Error(err)
	}
	r.inOrder(t, first+11*maxBatch, first+(fit+11)*maxBatch)
}

// Once closed, there is one try for each batch, and the loss is told in figures.
func TestQueueEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, log := &receiver{}, &logged{}
		r.fail = func(int) error { return errors.New("connection refused") }
		q := newQueue(r.destination(), log.logger())
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
