package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/docker/go-units"
)

const (
	// maxBatch is how many metrics go into one request: Backstop needs 50 ms for them.
	maxBatch = 5_000
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

// queue stands between sampling and delivery. Sampling puts metrics in and never waits for a delivery;
// deliver hands them to post, one batch at a time. A batch leaves the queue when post has succeeded, or when it is
// given up for a reason that is logged and counted.
//
// Which goes first: a batch that was put while deliveries succeeded is fresh and goes before all that are
// late, so that a backlog of a day does not hold up the present. Those that were there at the start, or when
// a delivery failed, or were put until the next success, are late: they go in the order of their
// times, as fast as they are taken.
type queue struct {
	to    destination
	spool *spool // nil: everything is in memory
	limit int64  // of bytes
	pace  pace
	log   *slog.Logger

	mu       sync.Mutex
	packer   packer
	late     []*batch // oldest first
	fresh    []*batch // likewise; all are younger than the late ones
	inFlight *batch   // the one of them that deliver is busy with
	metrics  int      // in all of them
	bytes    int64    // likewise
	outage   *outage  // nil while all goes well
	room     loss     // metrics given up for want of room, not logged yet
	roomTold time.Time
	diskSaid bool // whether it was logged that the spool does not work
	lost     int  // metrics given up for other reasons
	figures  figures
	changed  chan struct{} // holds one value where there is news for deliver
	closed   chan struct{} // closed once nothing more is put in

	largest int // metrics that a request may have, as far as deliver knows
}

// batch is what is kept as one: a sweep, or a part of a large one.
type batch struct {
	file    string // in the spool, "" while it is in memory
	packed  []byte // its body, where it is not in a file
	body    []byte // the same unpacked, nil where it had to wait
	size    int64  // bytes where it is kept
	metrics int
	oldest  int64 // Unix seconds
	tried   bool  // without success

	// What became of it, where it had to be halved
	parts    []part // that are still to be delivered
	accepted int    // metrics of other parts
	refusals int    // of parts
	refused  []part // of one metric each
	asked    bool   // whether those were asked for a second time
	refusal  error  // of the last of them
}

// part is what goes into one request.
type part struct {
	body    []byte
	metrics int
}

// outage is a time in which metrics have to wait.
type outage struct {
	troubled  bool     // whether there was trouble, or just a backlog at the start
	failing   bool     // whether there still is
	told      []string // what was logged of it
	delivered int      // metrics since it began
	oldest    int64    // of them, in Unix seconds
	dropped   int      // metrics given up since it began
}

// loss is of metrics in a span of times, in Unix seconds.
type loss struct {
	metrics     int
	from, until int64
}

// figures counts metrics.
type figures struct{ sent, retried, dropped uint64 }

// newQueue returns an empty queue that keeps up to limit bytes in memory.
func newQueue(to destination, limit int64, log *slog.Logger) *queue {
	return &queue{to: to, limit: limit, pace: usualPace, log: log, largest: maxBatch,
		changed: make(chan struct{}, 1), closed: make(chan struct{})}
}

// useSpool keeps what the queue holds in s from now on, and takes over what an earlier run left there. The error is that
// of a folder that is not for us; one that does not work now may do so later, which is logged.
func (q *queue) useSpool(s *spool) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.spool = s
	err := q.openSpool()
	if errors.Is(err, errSpoolTaken) || errors.Is(err, fs.ErrPermission) {
		q.spool = nil
		return err
	}
	q.tellDisk(err)
	return nil
}

// openSpool takes over the spool's folder and what is in it. It is called with mu held.
func (q *queue) openSpool() error {
	known := map[string]bool{}
	for b := range q.all() {
		known[b.file] = true
	}
	found, err := q.spool.open(known)
	if err != nil || len(found) == 0 {
		return err
	}
	metrics := 0
	for _, b := range found {
		metrics += b.metrics
		q.bytes += b.size
	}
	q.metrics += metrics
	q.late = slices.Concat(found, q.late)
	if q.outage == nil {
		q.outage = &outage{}
	}
	q.log.Info("metrics of an earlier run wait in the spool", "metrics", metrics, "batches", len(found), "since", inUTC(found[0].oldest))
	q.bound()
	q.signal()
	return nil
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

// put queues metrics; when it returns, they are on the disk, where there is one that works. Where there is no
// room, the oldest are given up.
func (q *queue) put(metrics []metric) {
	q.mu.Lock()
	defer q.mu.Unlock()
	soon := q.metrics == 0 // their turn comes at once
	for some := range slices.Chunk(metrics, maxBatch) {
		q.add(some, soon)
	}
	q.bound()
	q.store()
	q.tellRoom(time.Now())
	q.log.Debug("queued", "metrics", len(metrics), q.state())
	q.signal()
}

// add appends a batch, in memory; its body stays unpacked if it is to be sent soon. It is called with mu held.
func (q *queue) add(metrics []metric, soon bool) {
	body := q.to.encode(metrics)
	b := &batch{
		packed:  q.packer.pack(body),
		metrics: len(metrics),
		oldest:  slices.MinFunc(metrics, func(a, b metric) int { return cmp.Compare(a.time, b.time) }).time,
	}
	b.size = int64(len(b.packed))
	if q.spool != nil {
		b.size = onDisk(b.size)
	}
	if soon {
		b.body = body
	}
	q.metrics += b.metrics
	q.bytes += b.size
	if q.outage != nil && q.outage.failing {
		q.late = append(q.late, b)
	} else {
		q.fresh = append(q.fresh, b)
	}
}

// signal tells deliver that there is news.
func (q *queue) signal() {
	select {
	case q.changed <- struct{}{}:
	default:
	}
}

// bound gives up the oldest batches until the rest fits. It is called with mu held.
func (q *queue) bound() {
	for q.held() > q.limit {
		if q.spool != nil && q.spool.removeBad() {
			continue
		}
		oldest := q.oldest()
		if oldest == nil {
			return
		}
		if q.room.metrics == 0 {
			q.room.from = oldest.oldest
		}
		q.room.metrics += oldest.metrics
		q.room.until = oldest.oldest
		if q.outage != nil {
			q.outage.dropped += oldest.metrics
		}
		q.figures.dropped += uint64(oldest.metrics)
		q.leave(oldest)
	}
}

// held returns the bytes that count for the limit. It is called with mu held.
func (q *queue) held() int64 {
	held := q.bytes
	if q.spool != nil {
		for _, f := range q.spool.bad {
			held += f.size
		}
	}
	return held
}

// all returns the batches, oldest first. It is called with mu held.
func (q *queue) all() iter.Seq[*batch] {
	return func(yield func(*batch) bool) {
		for _, list := range [][]*batch{q.late, q.fresh} {
			for _, b := range list {
				if !yield(b) {
					return
				}
			}
		}
	}
}

// oldest returns the first batch to give up, nil if there is none. It is called with mu held.
func (q *queue) oldest() *batch {
	for b := range q.all() {
		if b != q.inFlight { // that one may just arrive
			return b
		}
	}
	return nil
}

// leave takes a batch off the queue. It is called with mu held.
func (q *queue) leave(b *batch) {
	for _, list := range []*[]*batch{&q.late, &q.fresh} {
		if i := slices.Index(*list, b); i >= 0 {
			*list = slices.Delete(*list, i, i+1)
			q.metrics -= b.metrics
			q.bytes -= b.size
		}
	}
	if b.file != "" {
		q.spool.remove(file{b.file, b.size})
	}
}

// store moves what is in memory into the spool, where there is one. It is called with mu held.
func (q *queue) store() {
	if q.spool == nil {
		return
	}
	var err error
	if !q.spool.isOpen() {
		err = q.openSpool()
	}
	if err == nil {
		q.spool.tidy()
		err = q.writeAll()
	}
	q.tellDisk(err)
}

// writeAll writes what is in memory to the disk. It is called with mu held.
func (q *queue) writeAll() error {
	for b := range q.all() {
		if b.file == "" && b != q.inFlight {
			if err := q.spool.write(b); err != nil {
				return err
			}
		}
	}
	return nil
}

// tellDisk logs when the spool begins to work and when it ceases to. It is called with mu held.
func (q *queue) tellDisk(err error) {
	switch {
	case err != nil && !q.diskSaid:
		q.log.Error("the spool cannot be used; metrics are kept in memory until it can", "error", errorText(err))
	case err == nil && q.diskSaid:
		q.log.Info("the spool can be used again")
	}
	q.diskSaid = err != nil
}

// tellRoom logs what was given up for want of room, at most once a minute. It is called with mu held.
func (q *queue) tellRoom(now time.Time) {
	if q.room.metrics == 0 || now.Sub(q.roomTold) < time.Minute {
		return
	}
	q.log.Error("no room for more metrics; the oldest are given up", "metrics", q.room.metrics,
		"from", inUTC(q.room.from), "until", inUTC(q.room.until), "limit", units.BytesSize(float64(q.limit)))
	q.room, q.roomTold = loss{}, now
}

// state describes the queue for the log. It is called with mu held.
func (q *queue) state() slog.Attr {
	return slog.Group("queue", "metrics", q.metrics, "batches", len(q.late)+len(q.fresh), "bytes", q.bytes)
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
			if len(b.refused) == 0 || b.asked {
				break
			}
			// Refused while something else was wrong, which was mended in the meantime? Then they are taken now.
			parts, b.refused, b.asked = b.refused, nil, true
		}
		p := parts[0]
		err := q.to.post(ctx, p.body)
		q.count(b, p, err)
		var r *refusal
		switch {
		case err == nil:
			parts = parts[1:]
			b.accepted += p.metrics
		case errors.As(err, &r) && r.remedy() == halveIt:
			if parts, err = q.halve(b, parts, r); err != nil {
				return err
			}
		default:
			b.body = nil
			if b.accepted > 0 || b.refusals > 0 {
				b.parts = parts
			}
			return err
		}
	}
	q.delivered(b, time.Since(start))
	return nil
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
		b.body, b.parts, b.refused, b.refusals, b.asked = nil, nil, nil, 0, false
		q.largest = maxBatch
		return nil, r
	}
	return rest, nil
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
	if q.outage == nil || len(q.late) > 0 {
		return
	}
	o := q.outage
	q.outage = nil
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

// inUTC is a time as the log has it.
func inUTC(seconds int64) string { return time.Unix(seconds, 0).UTC().Format(time.RFC3339) }
