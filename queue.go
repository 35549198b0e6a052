package main

import (
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/docker/go-units"
)

// maxFlight is longer than a request takes. After it, the watchdog restarts the daemon.
const maxFlight = 5 * time.Minute

// storeWait is how long delivery waits until a batch is on the disk, and the end of the daemon
// until all are. Then they go on without: a disk may hang.
const storeWait = 2 * time.Second

// queue stands between sampling and delivery. Sampling puts metrics in and never waits for the
// receiver; delivery takes one batch at a time, and takes it off when it was accepted.
//
// Which goes first: batches that were put while deliveries succeed are fresh and go before all that
// are late, so that a day's backlog does not hold up the present. What was there at the start, or
// when a delivery failed, or was put until the next success, is late: it goes oldest first.
type queue struct {
	log   *slog.Logger
	limit int64 // of bytes

	mu       sync.Mutex
	batches  []*batch  // oldest first
	late     int       // how many of them are late; the fresh ones follow
	inFlight *batch    // the one that delivery is busy with
	progress time.Time // when delivery last began or ended something
	trouble  string    // why the last delivery failed, "" if it succeeded
	loss     loss
	disk     disk
	changed  chan struct{} // holds one value when there is news for delivery
	unstored chan struct{} // holds one value when there is something to store
	closed   chan struct{} // closed when nothing more is put

	figures struct{ sent, retried, dropped uint64 } // metrics since the start
}

// disk is what the queue knows of the spool.
type disk struct {
	used     bool   // whether there is a spool
	readable bool   // whether its files can be read now
	writable bool   // whether it took the last batch
	litter   []file // that are to be removed
}

// loss is of metrics that were dropped because the queue was full, and not logged yet.
type loss struct {
	metrics     int
	from, until int64     // their times, in Unix seconds
	logged      time.Time // when the loss before this one was
}

// newQueue returns an empty queue that keeps up to limit bytes.
func newQueue(limit int64, log *slog.Logger) *queue {
	return &queue{limit: limit, log: log, changed: make(chan struct{}, 1),
		unstored: make(chan struct{}, 1), closed: make(chan struct{})}
}

// close ends the queue: nothing more is put.
func (q *queue) close() { close(q.closed) }

func (q *queue) isClosed() bool {
	select {
	case <-q.closed:
		return true
	default:
		return false
	}
}

// notify puts a value into a channel that has room for one.
func notify(to chan struct{}) {
	select {
	case to <- struct{}{}:
	default:
	}
}

// put queues metrics. If there is no room, the oldest are dropped.
func (q *queue) put(metrics []metric) {
	q.mu.Lock()
	defer q.mu.Unlock()
	soon := len(q.batches) == 0 // their turn comes at once, so they need not be packed
	for some := range slices.Chunk(metrics, maxBatch) {
		b := newBatch(some)
		if _, held := q.size(); !soon || q.disk.used || held+b.size > q.limit {
			b.pack(q.disk.used)
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
	q.logLoss(false)
	_, held := q.size()
	if q.disk.writable {
		held = 0 // of memory
	}
	tuneCollector(held)
	q.log.Debug("queued", "metrics", len(metrics), q.state())
	notify(q.unstored)
	notify(q.changed)
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
	i, late := 0, q.late
	q.batches = slices.DeleteFunc(q.batches, func(b *batch) bool { // in order, each once
		i++
		if held <= q.limit || b == q.inFlight { // that may just arrive
			return false
		}
		if i <= late {
			q.late--
		}
		if q.loss.metrics == 0 {
			q.loss.from = b.oldest
		}
		q.loss.metrics += b.count
		q.loss.until = b.oldest
		q.figures.dropped += uint64(b.count)
		held -= b.size
		q.discard(b)
		return true
	})
}

// discard has the file of b removed. It is called with mu held.
func (q *queue) discard(b *batch) {
	if b.file != "" {
		q.disk.litter = append(q.disk.litter, file{b.file, b.size})
	}
	notify(q.unstored)
}

// remove takes b off the queue, and reports whether it was there. It is called with mu held.
func (q *queue) remove(b *batch) bool {
	i := slices.Index(q.batches, b)
	if i < 0 { // it was dropped while it was pending
		return false
	}
	q.batches = slices.Delete(q.batches, i, i+1)
	if i < q.late {
		q.late--
	}
	q.discard(b)
	return true
}

// logLoss logs what was dropped to make room: once a minute, or when an outage is over.
func (q *queue) logLoss(over bool) {
	now, lost := time.Now(), q.loss
	if lost.metrics == 0 || !over && now.Sub(lost.logged) < time.Minute {
		return
	}
	q.log.Error("no room for more metrics, dropping the oldest", "metrics", lost.metrics,
		"from", inUTC(lost.from), "until", inUTC(lost.until), "limit", units.BytesSize(float64(q.limit)))
	q.loss = loss{logged: now}
}

// next waits for the batch whose turn it is: the first fresh one, or else the first late one; or
// the newest of all, if that is asked for. It returns nil at wake, and when the queue is closed and
// has no more. idle is called when the queue is empty.
func (q *queue) next(newest bool, wake <-chan time.Time, idle func()) *batch {
	for {
		closed := q.isClosed() // asked first: whatever was put before is seen below
		q.mu.Lock()
		b, wait := q.turn(newest)
		q.inFlight, q.progress = b, time.Now()
		empty := len(q.batches) == 0
		q.mu.Unlock()
		if empty {
			idle()
		}
		if b != nil || closed && wait == 0 {
			return b
		}
		var stored <-chan time.Time
		if wait > 0 {
			stored = time.After(wait)
		}
		ends := q.closed
		if closed {
			ends = nil
		}
		select {
		case <-q.changed:
		case <-stored:
		case <-ends:
		case <-wake:
			return nil
		}
	}
}

// turn returns the batch whose turn it is, nil if none can be read now. wait is how long one is
// still waited for that is about to be stored, 0 for none. It is called with mu held.
func (q *queue) turn(newest bool) (b *batch, wait time.Duration) {
	order := [][]*batch{q.batches[q.late:], q.batches[:q.late]}
	if newest && len(q.batches) > 0 {
		order = slices.Insert(order, 0, q.batches[len(q.batches)-1:])
	}
	now := time.Now()
	for _, batches := range order {
		for _, b := range batches {
			inMemory := b.body != nil || b.packed != nil
			unstored := inMemory && b.file == "" && q.disk.writable
			switch left := storeWait - now.Sub(b.put); {
			case !b.pending.IsZero(): // it had its turn
			case unstored && left > 0:
				wait = max(wait, left)
			case inMemory || q.disk.readable:
				return b, 0
			}
		}
	}
	return nil, wait
}

// progresses says that delivery does not hang.
func (q *queue) progresses() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.progress = time.Now()
}

// posted counts a request with so many metrics of b.
func (q *queue) posted(b *batch, metrics int, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.progress = time.Now()
	if b.tried {
		q.figures.retried += uint64(metrics)
	}
	b.tried = b.tried || err != nil
}

// drop counts metrics of b as dropped.
func (q *queue) drop(b *batch, metrics int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.figures.dropped += uint64(metrics)
	b.count -= metrics
}

// forget takes b off the queue; its file was set aside.
func (q *queue) forget(b *batch) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.inFlight, b.file = nil, ""
	q.remove(b)
}

// done takes b off the queue, whose delivery began at start, and ends the trouble. It reports
// whether b was late, and whether no batch is any more.
func (q *queue) done(b *batch, start time.Time) (wasLate, over bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.inFlight, q.trouble = nil, ""
	before, took := q.late, time.Since(start)
	if q.remove(b) {
		q.figures.sent += uint64(b.count)
	}
	if before > 0 && q.late == 0 {
		q.logLoss(true)
	}
	q.log.Debug("delivered", "metrics", b.count, "took", took.Round(time.Millisecond), q.state())
	return q.late < before, q.late == 0
}

// putBack ends the flight of b, of which left is still to be delivered; nil is all of it. b is
// late now, and because of trouble, if there is any, so is everything else.
func (q *queue) putBack(b *batch, left []byte, trouble string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.inFlight = nil
	if !b.pending.IsZero() {
		b.pending, b.tried = time.Time{}, true
	}
	if left != nil { // a file keeps the whole: a crash loses nothing
		q.figures.sent += uint64(b.count - countOf(left))
		b.body, b.packed, b.count, b.extra = left, pack(left), countOf(left), true
	} else if b.file != "" && !b.extra {
		b.packed = nil
	}
	q.late = max(q.late, slices.Index(q.batches, b)+1)
	if trouble != "" {
		q.trouble, q.late = trouble, len(q.batches)
	}
	for _, b := range q.batches[:q.late] {
		if b.body != nil { // its turn does not come at once
			b.pack(q.disk.used)
			b.body = nil
		}
	}
}

// hasFresh reports whether a fresh batch waits beside the one in flight.
func (q *queue) hasFresh() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return slices.ContainsFunc(q.batches[q.late:], func(b *batch) bool { return b != q.inFlight })
}

// hangs reports whether a request takes much longer than any may.
func (q *queue) hangs() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.inFlight != nil && time.Since(q.progress) > maxFlight
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

// backlog returns what waits, the time of the oldest metric if any is late, and why they wait.
func (q *queue) backlog() (metrics int, bytes int64, since, trouble string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	metrics, bytes = q.size()
	if q.late > 0 {
		since = inUTC(q.batches[0].oldest)
	}
	return metrics, bytes, since, q.trouble
}
