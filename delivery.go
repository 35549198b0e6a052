package main

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"slices"
	"time"
)

const (
	// minRequest is how many metrics a slow receiver gets at once at least. They are 10 KB.
	minRequest = 100
	// probes is how often in a row a metric has to be accepted until another one is to blame for
	// being refused: a receiver that refuses every second, third or fourth request never does that.
	probes = 4
)

// delivery takes batches off a queue and posts them, one request at a time. Its methods are called
// by one goroutine.
type delivery struct {
	to     destination
	queue  *queue
	pauses pauses
	rest   func() // called when everything is delivered
	log    *slog.Logger

	pending []*batch  // posted, but not confirmed
	since   time.Time // when the first of them was posted
	last    bool      // whether the last try began after the queue was closed
	most    int       // metrics in a request
	good    []byte    // the last metric that was accepted, nil if none is known
	outage  outage
}

// outage is what the log says of the receiver, and of an outage when that is over.
type outage struct {
	worked bool      // whether anything was delivered
	waited int       // metrics that had to wait and were delivered in it
	since  time.Time // the first failure, or the oldest metric of an earlier run; zero: none yet
	news   news
}

// newDelivery prepares for delivering what is in q. rest is called when that is empty.
func newDelivery(to destination, q *queue, rest func(), log *slog.Logger) *delivery {
	return &delivery{to: to, queue: q, rest: rest, log: log, most: maxBatch,
		pauses: pauses{first: time.Second, longest: time.Minute}}
}

// deliver posts what is in the queue until that is closed and empty. What fails is tried again; a
// try that began after the queue was closed and fails is the last. ctx ends it in any case. The
// error says how many metrics were not delivered.
func (d *delivery) deliver(ctx context.Context) error {
	for {
		over, err := d.round(ctx)
		switch {
		case over:
			return d.end("")
		case err == nil:
			continue
		case d.last || ctx.Err() != nil:
			return d.end(errorText(err))
		}
		pause := d.pauses.after(err)
		d.logTrouble(err, pause)
		select {
		case <-time.After(pause):
		case <-d.queue.closed:
		}
	}
}

// round sends the next batch, or settles what is pending: when nothing else can be sent, or after
// 15 s. It is over when the queue is closed and nothing is left that can be sent.
func (d *delivery) round(ctx context.Context) (over bool, err error) {
	isPending := len(d.pending) > 0
	if !isPending || time.Since(d.since) < 15*time.Second {
		if metrics, _, _, _ := d.queue.backlog(); metrics == 0 {
			d.rest()
			if d.to.idle != nil {
				d.to.idle()
			}
		}
		b, body := d.queue.next(isPending)
		switch {
		case b != nil:
			return false, d.send(ctx, b, body)
		case !isPending:
			return true, nil
		}
	}
	return false, d.settle(ctx)
}

// flight is the delivery of one batch, as far as it got.
type flight struct {
	parts   [][]byte // bodies that are still to be posted, in order
	bad     [][]byte // metrics that were refused, one in each body
	refusal error    // of the last of them
}

// cut cuts the first part behind its nth metric.
func (f *flight) cut(n int) {
	first, rest := cut(f.parts[0], n)
	f.parts = slices.Concat([][]byte{first, rest}, f.parts[1:])
}

// send delivers b and takes it off the queue. What is left of it is put back: on an error, or if
// the search for bad metrics would hold up the present.
func (d *delivery) send(ctx context.Context, b *batch, body []byte) (err error) {
	d.last = d.queue.isClosed()
	start, f := time.Now(), &flight{parts: [][]byte{body}}
	for err == nil && len(f.parts) > 0 && (len(f.bad) == 0 || !d.queue.hasFresh()) {
		err = d.step(ctx, f)
	}
	d.setAside(b, f)
	switch {
	case len(f.parts) > 0:
		d.queue.putBack(b, join(f.parts), len(f.bad), errorText(err))
	case d.to.confirm == nil:
		d.delivered(b, len(f.bad), time.Since(start))
	default:
		if d.queue.posted(b); len(d.pending) == 0 {
			d.since = start
		}
		d.pending = append(d.pending, b)
	}
	if err != nil && len(d.pending) > 0 {
		_ = d.settle(ctx) // most likely it is lost for the same reason
	}
	return err
}

// step posts the first part of f, or as much of it as goes into a request. What is refused because
// of something in it, or because of its size, is halved for the next steps.
func (d *delivery) step(ctx context.Context, f *flight) error {
	n := countOf(f.parts[0])
	if n > d.most {
		n = d.most
		f.cut(n)
	}
	err := d.post(ctx, f)
	switch {
	case isTooSlow(err):
		d.most = min(d.most, max(n/2, minRequest))
		return err
	case err == nil || !isToHalve(err):
		return err
	case n == 1:
		return d.judge(ctx, f)
	case hasStatus(err, http.StatusRequestEntityTooLarge):
		d.most = n / 2
	default:
		f.cut(n / 2)
	}
	return nil
}

// post posts the first part of f, and takes it off if it is accepted.
func (d *delivery) post(ctx context.Context, f *flight) error {
	part := f.parts[0]
	err := d.to.post(ctx, part)
	d.queue.requested(countOf(part), err)
	if err == nil {
		f.parts, d.good = f.parts[1:], lastOf(part)
		d.most = min(maxBatch, d.most+d.most/8+1)
	}
	return err
}

// judge decides about the lone metric ahead in f, which was refused. It is to blame if another one
// is accepted several times in a row, and it is refused again. If the other one is refused too, no
// metric is to blame: everything is kept.
func (d *delivery) judge(ctx context.Context, f *flight) error {
	probe := d.good
	if probe == nil {
		body := join(f.parts)
		some, _ := cut(body, 1+rand.N(countOf(body)))
		probe = lastOf(some)
	}
	d.good = nil // it may be too old by now
	for range probes {
		err := d.to.post(ctx, probe)
		d.queue.requested(0, err)
		if err != nil {
			return err
		}
	}
	d.good = probe
	alone := f.parts[0]
	err := d.post(ctx, f)
	if isToHalve(err) {
		f.parts, f.bad, f.refusal = f.parts[1:], append(f.bad, alone), err
		return nil
	}
	return err
}

// setAside keeps the bad metrics of f in a file of the spool, if there is one, and logs them.
func (d *delivery) setAside(b *batch, f *flight) {
	if len(f.bad) == 0 {
		return
	}
	some := bytes.Join(f.bad[:min(len(f.bad), 10)], []byte(" "))
	attrs := []any{"metrics", len(f.bad), "example", string(some), "error", errorText(f.refusal)}
	if name := d.queue.setAside(join(f.bad), b.oldest); name != "" {
		attrs = append(attrs, "file", name)
	}
	d.log.Error("metrics refused, dropping them", attrs...)
}

// settle waits until it is known whether what is pending has arrived. If not, it is sent again.
func (d *delivery) settle(ctx context.Context) error {
	select {
	case <-time.After(d.to.proof):
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	err := d.to.confirm()
	for _, b := range d.pending {
		if err == nil {
			d.delivered(b, 0, time.Since(d.since))
		} else {
			d.queue.putBack(b, nil, 0, errorText(err))
		}
	}
	d.pending = nil
	return err
}

// delivered takes b off the queue, of which so many metrics were bad, and logs the end of an
// outage.
func (d *delivery) delivered(b *batch, bad int, took time.Duration) {
	d.pauses.reset()
	over := d.queue.done(b, bad, took)
	o := &d.outage
	if b.isLate {
		o.waited += b.count - bad
	}
	if o.since.IsZero() {
		o.since = time.Unix(b.oldest, 0)
	}
	if !over {
		return
	}
	after := []any{"metrics", o.waited, "lasted", time.Since(o.since).Round(time.Second)}
	switch {
	case o.news.isNew(""):
		d.log.Info(d.to.name+" reachable again, kept metrics are delivered", after...)
	case !o.worked && o.waited > 0:
		d.log.Info("metrics of the earlier run are delivered", after...)
	case !o.worked && d.to.remote:
		d.log.Info("first delivery accepted", "metrics", b.count)
	}
	o.worked, o.waited, o.since = true, 0, time.Time{}
}

// logTrouble logs why metrics have to wait, what waits, and when the next try is, if that is news,
// and again each hour.
func (d *delivery) logTrouble(err error, pause time.Duration) {
	if d.outage.since.IsZero() {
		d.outage.since = time.Now()
	}
	text := errorText(err)
	if news := &d.outage.news; !news.isNew(text) && !news.isOld(text) {
		return
	}
	metrics, bytes, since, _ := d.queue.backlog()
	d.log.Error(d.to.name+" "+failing(err),
		"since", since, "metrics", metrics, "bytes", bytes,
		"retry", pause.Round(100*time.Millisecond), "error", text)
}

// end says what becomes of metrics that were not delivered.
func (d *delivery) end(trouble string) error {
	d.queue.end()
	kept, lost, dropped := d.queue.left()
	d.logLeft(kept, lost, trouble)
	if n := kept + lost + dropped; n > 0 {
		return fmt.Errorf("%d metrics not delivered", n)
	}
	return nil
}

// logLeft logs how many metrics are not delivered in the end, and why: those that are kept in the
// spool, and those that are lost.
func (d *delivery) logLeft(kept, lost int, trouble string) {
	if kept+lost > 0 {
		d.log.Error("ended before everything was delivered",
			"lost", lost, "kept", kept, "error", trouble)
	}
}
