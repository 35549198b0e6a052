package main

import (
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/docker/go-units"
)

// queue stands between sampling and delivery. Sampling puts metrics in and never waits for the
// receiver; delivery takes one batch at a time, and takes it off when it was accepted.
//
// Which goes first: batches that were put while deliveries succeed are fresh and go before all that
// are late, so that a day's backlog does not hold up the present. What was there at the start, or
// when a delivery failed, or was put until the next success, is late: it goes oldest first.
type queue struct {
	log   *slog.Logger
	spool *spool // nil: everything is in memory
	limit int64  // of bytes

	mu       sync.Mutex
	batches  []*batch // oldest first
	late     int      // how many of them are late; the fresh ones follow
	inFlight *batch   // the one that delivery is busy with
	trouble  string   // why the last delivery failed, "" if it succeeded
	loss     loss
	changed  chan struct{} // holds one value when there is news for delivery
	closed   chan struct{} // closed when nothing more is put

	figures struct{ sent, retried, dropped uint64 } // metrics since the start
}

// loss is of metrics that were dropped because the queue was full, and not logged yet.
type loss struct {
	metrics     int
	from, until int64     // their times, in Unix seconds
	told        time.Time // when the loss before this one was logged
}

// newQueue returns an empty queue that keeps up to limit bytes in memory.
func newQueue(limit int64, log *slog.Logger) *queue {
	return &queue{limit: limit, log: log, changed: make(chan struct{}, 1), closed: make(chan struct{})}
}

// useSpool keeps what the queue holds in s from now on, and takes over what an earlier run left
// there. A folder that is unfit for good is an error; one that does not work now may do so later,
// which is logged.
func (q *queue) useSpool(s *spool) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.spool = s
	err := q.openSpool()
	if isForGood(err) {
		q.spool = nil
		return err
	}
	s.tell(err)
	return nil
}

// openSpool opens the spool's folder and queues what is in it. It is called with mu held.
func (q *queue) openSpool() error {
	known := map[string]bool{}
	for _, b := range q.batches {
		known[b.file] = true
	}
	found, err := q.spool.open(known)
	if err != nil || len(found) == 0 {
		return err
	}
	before, _ := q.size()
	q.batches = slices.Concat(found, q.batches)
	q.late += len(found)
	all, _ := q.size()
	q.log.Info("metrics of an earlier run wait in the spool",
		"metrics", all-before, "batches", len(found), "since", inUTC(found[0].oldest))
	q.bound()
	q.signal()
	return nil
}

// close tells delivery that nothing more is put.
func (q *queue) close() { close(q.closed) }

func (q *queue) isClosed() bool {
	select {
	case <-q.closed:
		return true
	default:
		return false
	}
}

// signal tells delivery that there is news.
func (q *queue) signal() {
	select {
	case q.changed <- struct{}{}:
	default:
	}
}

// put queues metrics. When it returns, they are on the disk, if there is a spool that works. If
// there is no room, the oldest are dropped.
func (q *queue) put(metrics []metric) {
	q.mu.Lock()
	defer q.mu.Unlock()
	soon := len(q.batches) == 0 // their turn comes at once, so they need not be packed
	for some := range slices.Chunk(metrics, maxBatch) {
		b := newBatch(some)
		if _, held := q.size(); !soon || q.spool != nil || held+b.size > q.limit {
			b.pack()
		}
		if q.spool != nil {
			b.size = onDisk(b.size)
		}
		if !soon {
			b.body = nil
		}
		q.batches = append(q.batches, b)
	}
	if q.trouble != "" {
		q.late = len(q.batches)
	}
	q.bound()
	q.store()
	q.tellLoss(false)
	q.log.Debug("queued", "metrics", len(metrics), q.state())
	q.signal()
}

// size returns what is in the queue. It is called with mu held.
func (q *queue) size() (metrics int, bytes int64) {
	for _, b := range q.batches {
		metrics += b.count
		bytes += b.size
	}
	return metrics, bytes
}

// bound drops the oldest batches until the rest fits. It is called with mu held.
func (q *queue) bound() {
	_, held := q.size()
	if q.spool != nil {
		held = q.spool.makeRoom(held, q.limit)
	}
	for _, b := range slices.Clone(q.batches) {
		if held <= q.limit {
			return
		}
		if b == q.inFlight {
			continue // it may just arrive
		}
		if q.loss.metrics == 0 {
			q.loss.from = b.oldest
		}
		q.loss.metrics += b.count
		q.loss.until = b.oldest
		q.figures.dropped += uint64(b.count)
		held -= b.size
		q.remove(b)
	}
}

// remove takes b off the queue. It is called with mu held.
func (q *queue) remove(b *batch) {
	if i := slices.Index(q.batches, b); i >= 0 {
		q.batches = slices.Delete(q.batches, i, i+1)
		if i < q.late {
			q.late--
		}
	}
	if b.file != "" {
		q.spool.remove(file{b.file, b.size})
	}
}

// store moves what is in memory into the spool. It is called with mu held.
func (q *queue) store() {
	if q.spool == nil {
		return
	}
	err := q.spool.check()
	tried := err != nil // whether there was anything to find out by
	if tried {
		q.spool.fail(err)
		err = q.openSpool()
	}
	if err == nil {
		q.spool.tidy()
	}
	for _, b := range q.batches {
		if err == nil && b.file == "" && b != q.inFlight {
			tried, err = true, q.spool.write(b)
		}
	}
	if tried {
		q.spool.tell(err)
	}
}

// tellLoss logs what was dropped to make room: once a minute, or when an outage is over.
func (q *queue) tellLoss(over bool) {
	now, lost := time.Now(), q.loss
	if lost.metrics == 0 || !over && now.Sub(lost.told) < time.Minute {
		return
	}
	q.log.Error("no room for more metrics; the oldest are given up", "metrics", lost.metrics,
		"from", inUTC(lost.from), "until", inUTC(lost.until), "limit", units.BytesSize(float64(q.limit)))
	q.loss = loss{told: now}
}

// next waits for the batch whose turn it is: the first fresh one, or else the first late one; or
// the newest of all, if that is asked for. It returns nil when the queue is closed and has no more.
// idle is called when the queue is empty.
func (q *queue) next(newest bool, idle func()) *batch {
	for {
		closed := q.isClosed() // asked first: whatever was put before is seen below
		q.mu.Lock()
		b := q.turn(newest)
		q.inFlight = b
		empty := len(q.batches) == 0
		q.mu.Unlock()
		if empty {
			idle()
		}
		if b != nil || closed {
			return b
		}
		select {
		case <-q.changed:
		case <-q.closed:
		}
	}
}

// turn returns the batch whose turn it is, nil if none can be read now. It is called with mu held.
func (q *queue) turn(newest bool) *batch {
	order := [][]*batch{q.batches[q.late:], q.batches[:q.late]}
	if newest && len(q.batches) > 0 {
		order = slices.Insert(order, 0, q.batches[len(q.batches)-1:])
	}
	for _, batches := range order {
		for _, b := range batches {
			if b.body != nil || b.packed != nil || q.spool.isOpen() {
				return b
			}
		}
	}
	return nil
}

// load returns the body of the batch in flight. ok is false if its file cannot be read now; if it
// never can be, it is set aside and off the queue, and lost says how many metrics that costs.
func (q *queue) load(b *batch) (body []byte, lost int, ok bool) {
	err := error(nil)
	switch body = b.body; {
	case body == nil && b.packed != nil:
		body, err = unpack(b.packed)
	case body == nil:
		body, err = q.spool.read(b.file)
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if err == nil {
		b.count = countOf(body) // the name of its file may be wrong
		return body, 0, true
	}
	q.inFlight = nil
	if q.spool != nil {
		if trouble := q.spool.trouble(err); trouble != nil {
			q.spool.fail(trouble)
			return nil, 0, false
		}
		q.spool.setAside(file{b.file, b.size}, b.count, err)
	}
	b.file = "" // it is not to be removed
	q.figures.dropped += uint64(b.count)
	q.remove(b)
	return nil, b.count, false
}

// posted counts a request with so many metrics of b.
func (q *queue) posted(b *batch, metrics int, err error) {
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
	b.count -= metrics
}

// giveUp counts metrics of the batch in flight, those in body, that are refused for good, and sets
// them aside in the spool. It returns the name of their file, "" if there is none.
func (q *queue) giveUp(b *batch, body []byte) (name string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	n := countOf(body)
	b.count -= n
	q.figures.dropped += uint64(n)
	if q.spool == nil {
		return ""
	}
	return q.spool.writeBad(&batch{packed: pack(body), count: n, oldest: b.oldest})
}

// done takes the batch in flight off the queue and ends the trouble. over reports whether no batch
// is late any more.
func (q *queue) done(b *batch, accepted int, took time.Duration) (over bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.inFlight, q.trouble = nil, ""
	late := q.late
	q.remove(b)
	if late > 0 && q.late == 0 {
		q.tellLoss(true)
	}
	q.log.Debug("delivered", "metrics", accepted, "took", took.Round(time.Millisecond), q.state())
	return q.late == 0
}

// putBack ends the flight of b, of which left is still to be delivered; nil is all of it. It is
// late now, and because of trouble, if there is any, so is everything else. since is the oldest
// time of all, in Unix seconds.
func (q *queue) putBack(b *batch, left []byte, trouble string) (since int64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.inFlight = nil
	if left != nil { // a file keeps the whole: a crash loses nothing
		b.body, b.packed, b.count = left, pack(left), countOf(left)
	}
	q.late = max(q.late, slices.Index(q.batches, b)+1)
	if q.trouble = trouble; trouble != "" {
		q.late = len(q.batches)
	}
	for _, b := range q.batches[:q.late] {
		if b.body != nil { // its turn does not come at once
			b.pack()
			b.body = nil
		}
	}
	return q.batches[0].oldest
}

// hasFresh reports whether a fresh batch waits beside the one in flight.
func (q *queue) hasFresh() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return slices.ContainsFunc(q.batches[q.late:], func(b *batch) bool { return b != q.inFlight })
}

// end stores what the disk did not take before, and closes the spool. It returns how many metrics
// are kept there, and how many are lost.
func (q *queue) end() (kept, lost int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.inFlight = nil
	q.store() // what the disk did not take before
	q.tellLoss(true)
	for _, b := range q.batches {
		if b.file == "" {
			lost += b.count
		} else {
			kept += b.count
		}
	}
	if q.spool != nil {
		q.spool.close()
	}
	return kept, lost
}

// own returns the queue's own metrics, for the host with this name in its metrics.
func (q *queue) own(host string, at time.Time) []metric {
	q.mu.Lock()
	defer q.mu.Unlock()
	now := at.Unix()
	_, bytes := q.size()
	return []metric{
		{host, ".metrics.sent", whole(q.figures.sent), now},
		{host, ".metrics.retried", whole(q.figures.retried), now},
		{host, ".metrics.dropped", whole(q.figures.dropped), now},
		{host, ".metrics.spooled", whole(uint64(bytes)), now},
	}
}

// state describes the queue for the log. It is called with mu held.
func (q *queue) state() slog.Attr {
	metrics, bytes := q.size()
	return slog.Group("queue", "metrics", metrics, "batches", len(q.batches), "bytes", bytes)
}

// describe says in a few words what waits, for a status line.
func (q *queue) describe() string {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.batches) == 0 {
		return "empty"
	}
	metrics, _ := q.size()
	text := fmt.Sprintf("%d metrics", metrics)
	if q.late > 0 {
		text += " since " + inUTC(q.batches[0].oldest)
	}
	if q.trouble != "" {
		text += ", " + q.trouble
	}
	return text
}
