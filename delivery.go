package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"time"
)

const (
	// maxLogged is how many of a batch's refused metrics are logged.
	maxLogged = 10
	// minRequest is how many metrics a slow receiver gets at once at least. They are 10 KB.
	minRequest = 100
	// probes is how often in a row a metric has to be accepted until another one is to blame for being
	// refused: more often than a receiver does that refuses every second, third or fourth request.
	probes = 4
)

// delivery takes batches off a queue and posts them, one request at a time. Its methods are called
// by one goroutine.
type delivery struct {
	to      destination
	queue   *queue
	store   *store
	pending pending
	pauses  *pauses
	rest    func() // called when everything is delivered
	patient bool   // whether it waits in the end for the confirmation of what the spool has
	log     *slog.Logger

	last   bool   // whether the last try began after the queue was closed
	most   int    // metrics in a request
	good   []byte // the last metric that was accepted, nil if none is known
	newest bool   // whether the newest batch goes first: nothing of an older one was accepted
	lost   int    // metrics that were refused, or could not be read
	worked bool   // whether anything was delivered
	outage outage
	news   news // of the receiver
}

// outage is a time in which metrics have to wait.
type outage struct {
	earlier   bool     // whether it began before this run
	logged    []string // the troubles that were logged
	delivered int      // late metrics
	oldest    int64    // their oldest time, in Unix seconds
}

// newDelivery prepares for delivering what is in the queue of st to to.
func newDelivery(to destination, st *store, log *slog.Logger) *delivery {
	q := st.queue
	d := &delivery{to: to, queue: q, store: st, pending: pending{queue: q, confirm: to.confirm},
		pauses: newPauses(usualPace), rest: func() {}, log: log, most: maxBatch}
	_, _, since, _ := q.backlog()
	d.outage.earlier = since != ""
	if to.watch != nil {
		to.watch(q.progresses)
	}
	return d
}

// deliver posts what is in the queue until that is closed and empty. What fails is tried again; a
// try that began after the queue was closed and fails is the last. ctx ends it in any case. The
// error says how many metrics were not delivered.
func (d *delivery) deliver(ctx context.Context) error {
	for {
		done, err := d.round(ctx)
		switch {
		case done:
			return d.end("")
		case err == nil:
			continue
		case d.last || ctx.Err() != nil:
			return d.end(errorText(err))
		}
		select {
		case <-time.After(d.pauses.after(err)):
		case <-d.queue.closed:
		}
	}
}

// round settles what is pending and sends the next batch, if there is one.
func (d *delivery) round(ctx context.Context) (done bool, err error) {
	if err := d.pending.settle(d.delivered); err != nil {
		d.logTrouble(err)
		return false, err
	}
	b := d.queue.next(d.newest, d.pending.wake(), d.rest)
	switch {
	case b != nil:
		d.last = d.queue.isClosed()
		return false, d.send(ctx, b)
	case d.pending.isEmpty() || d.queue.isClosed() && !d.patient && d.store.hasAll():
		return true, nil
	}
	select {
	case <-d.pending.wake():
	case <-d.queue.changed: // the spool may have everything now
	case <-ctx.Done():
	}
	return false, context.Cause(ctx)
}

// flight is the delivery of one batch, as far as it got.
type flight struct {
	*batch
	parts    [][]byte // bodies that are still to be posted, in order
	accepted bool     // whether a part was
	bad      [][]byte // metrics that were refused, one in each body
	refusal  error    // of the last of them
}

// left returns the body of what is still to be posted, nil for the whole batch.
func (f *flight) left() []byte {
	if !f.accepted && len(f.bad) == 0 {
		return nil
	}
	return join(f.parts)
}

// cut cuts the first part behind its nth metric.
func (f *flight) cut(n int) {
	first, rest := cut(f.parts[0], n)
	f.parts = slices.Concat([][]byte{first, rest}, f.parts[1:])
}

// send delivers b and takes it off the queue. What is left of it stays there: on an error, or if
// others go first.
func (d *delivery) send(ctx context.Context, b *batch) (err error) {
	start := time.Now()
	body, err := d.store.load(ctx, b)
	if errors.Is(err, errAway) || ctx.Err() != nil {
		d.queue.putBack(b, nil, "")
		return context.Cause(ctx)
	} else if err != nil {
		d.lost += b.count
		d.queue.drop(b, b.count)
		d.queue.forget(b)
		return nil
	}
	f := &flight{batch: b, parts: [][]byte{body}}
	for err == nil && len(f.parts) > 0 {
		if err = d.step(ctx, f); len(f.bad) > 0 && d.queue.hasFresh() {
			break // the search for bad metrics does not hold up the present
		}
	}
	d.setAside(f)
	switch {
	case len(f.parts) == 0 && d.to.confirm != nil:
		d.pending.add(b, start)
	case len(f.parts) == 0:
		d.delivered(b, start)
	case err == nil || errors.Is(err, errNewestFirst):
		d.queue.putBack(b, f.left(), "")
		return nil
	default:
		_ = d.pending.settle(d.delivered) // most likely it is lost for the same reason
		d.queue.putBack(b, f.left(), errorText(err))
		if !d.last { // else end has it
			d.logTrouble(err)
		}
	}
	return err
}

// step posts the first part of f, or as much of it as goes into a request. What is refused because
// of something in it, or because of its size, is halved for the next steps.
func (d *delivery) step(ctx context.Context, f *flight) error {
	n := countOf(f.parts[0])
	if n > d.most && d.to.confirm == nil { // a batch is confirmed as a whole
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
	case isTooLarge(err):
		d.most = n / 2
	default:
		f.cut(n / 2)
	}
	return nil
}

// post posts the first part of f, and takes it off if it is accepted.
func (d *delivery) post(ctx context.Context, f *flight) error {
	part := f.parts[0]
	n := countOf(part)
	err := d.to.post(ctx, part)
	d.queue.posted(f.batch, n, err)
	if err != nil {
		return err
	}
	f.parts = f.parts[1:]
	f.accepted = true
	d.good, d.newest = lastOf(part), false
	d.most = min(maxBatch, d.most+d.most/8+1)
	return nil
}

// errNewestFirst lets the newest batch go first: old metrics may be the trouble.
var errNewestFirst = errors.New("nothing is accepted")

// judge decides about the lone metric ahead in f, which was refused. It is to blame if another one
// is accepted several times in a row, and it is refused again. If the other one is refused too, no
// metric is to blame: the error says so, and everything is kept.
func (d *delivery) judge(ctx context.Context, f *flight) error {
	probe := d.good
	if probe == nil {
		body := join(f.parts)
		some, _ := cut(body, 1+rand.N(countOf(body)))
		probe = lastOf(some)
	}
	for i := range probes {
		err := d.to.post(ctx, probe)
		d.queue.progresses()
		switch {
		case err == nil:
			d.good, d.newest = probe, false
			continue
		case !isToHalve(err):
			return err
		}
		d.good = nil // it may be too old by now
		switch {
		case i > 0:
			return errUnsteady
		case !d.newest:
			d.newest = true
			return errNewestFirst
		}
		return err
	}
	alone := f.parts[0]
	err := d.post(ctx, f)
	if isToHalve(err) {
		f.parts, f.bad, f.refusal = f.parts[1:], append(f.bad, alone), err
		return nil
	}
	return err
}

// setAside drops the bad metrics of f, and keeps them in a file of the spool if there is one.
func (d *delivery) setAside(f *flight) {
	if len(f.bad) == 0 {
		return
	}
	d.lost += len(f.bad)
	some := bytes.Join(f.bad[:min(len(f.bad), maxLogged)], []byte(" "))
	attrs := []any{"metrics", len(f.bad), "example", string(some), "error", errorText(f.refusal)}
	d.queue.drop(f.batch, len(f.bad))
	if name := d.store.setAside(join(f.bad), f.oldest); name != "" {
		attrs = append(attrs, "file", name)
	}
	d.log.Error("metrics refused, dropping them", attrs...)
}

// delivered takes b off the queue, whose delivery began at start, and logs the end of an outage.
func (d *delivery) delivered(b *batch, start time.Time) {
	d.pauses.reset()
	o := &d.outage
	wasLate, over := d.queue.done(b, start)
	if wasLate {
		o.delivered += b.count
	}
	if o.oldest == 0 || b.oldest < o.oldest {
		o.oldest = b.oldest
	}
	if !over {
		return
	}
	after := []any{"metrics", o.delivered,
		"lasted", time.Since(time.Unix(o.oldest, 0)).Round(time.Second)}
	switch {
	case d.news.isNew(""):
		d.log.Info(d.to.name+" reachable again, kept metrics are delivered", after...)
	case o.earlier && o.delivered > 0:
		d.log.Info("metrics of the earlier run are delivered", after...)
	case !d.worked && d.to.remote:
		d.log.Info("first delivery accepted", "metrics", b.count)
	}
	d.worked, d.outage = true, outage{}
}

// logTrouble logs why metrics have to wait, and what waits: each trouble once in an outage, but not
// too many, and again each hour.
func (d *delivery) logTrouble(err error) {
	text, logged := errorText(err), d.outage.logged
	switch {
	case len(logged) == maxNews || slices.Contains(logged, text):
		if !d.news.isOld(text) {
			return
		}
	case d.news.isNew(text):
		d.outage.logged = append(logged, text)
	default:
		return
	}
	metrics, bytes, since, _ := d.queue.backlog()
	d.log.Error(d.to.name+" "+failing(err),
		"since", since, "metrics", metrics, "bytes", bytes, "error", text)
}

// end says what becomes of metrics that were not delivered.
func (d *delivery) end(trouble string) error {
	kept, pending, lost := d.store.end()
	if trouble == "" && pending > 0 { // most likely it has arrived; the next run sends it again
		kept -= pending
		d.log.Debug("kept until it is confirmed", "metrics", pending, "spool", d.store.spool.dir)
	}
	if kept+lost > 0 {
		d.logLeft(kept, lost, trouble)
	}
	if n := kept + lost + d.lost; n > 0 {
		return fmt.Errorf("%d metrics not delivered", n)
	}
	return nil
}

// logLeft logs how many metrics are not delivered in the end, and why.
func (d *delivery) logLeft(kept, lost int, trouble string) {
	var attrs []any
	if lost > 0 {
		attrs = append(attrs, "lost", lost)
	}
	if kept > 0 {
		attrs = append(attrs, "kept", kept, "spool", d.store.spool.dir)
	}
	if trouble != "" {
		attrs = append(attrs, "error", trouble)
	}
	d.log.Error("ended before everything was delivered", attrs...)
}
