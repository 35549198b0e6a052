package main

import (
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/docker/go-units"
)

const (
	// maxFlight is longer than a request takes. After it, the watchdog restarts the daemon.
	maxFlight = 5 * time.Minute
	// storeWait is how long anybody waits for the disk. Then they go on without: it may hang.
	storeWait = 2 * time.Second
)

// queue stands between sampling, delivery and the disk, and one lock guards all of it. Sampling
// puts metrics in and never waits. Delivery takes one batch after the other, and says what became
// of it. keep writes batches into files and reads them, in a goroutine of its own.
//
// Which goes first: batches that were put while deliveries succeed are fresh and go before all that
// are late, so that a day's backlog does not hold up the present. What was there at the start, or
// when a delivery failed, or was put until the next success, is late: it goes oldest first. Until
// that success, see line.first.
type queue struct {
	log   *slog.Logger
	limit int64      // of bytes
	spool *spool     // nil: everything is in memory only
	works sync.Mutex // held while the disk does

	mu       sync.Mutex
	changed  *sync.Cond
	line     line
	progress time.Time // when delivery last began or ended something
	disk     disk
	closed   chan struct{} // closed when nothing more is put
	kept     chan struct{} // closed when keep has ended

	figures figures
}

// figures are numbers of metrics since the start.
type figures struct {
	sent, retried, dropped uint64

	untold      uint64 // dropped as there was no room, and not in the log yet
	from, until int64  // the oldest and the newest time of these, in Unix seconds
	news        news   // of that
}

// disk is what the queue knows of the spool.
type disk struct {
	busy    time.Time // since when it works, zero if it does not
	isOpen  bool      // whether its files can be read
	trouble error     // why it takes no more, nil if it does
	rests   bool      // whether it is left alone until something changes
	ends    bool      // whether it is left alone for good once it rests
	litter  []file    // to be removed
	news    news
}

// newQueue returns an empty queue that keeps up to limit bytes in memory.
func newQueue(limit int64, log *slog.Logger) *queue {
	q := &queue{limit: limit, log: log, closed: make(chan struct{}), kept: make(chan struct{})}
	q.changed = sync.NewCond(&q.mu)
	return q
}

// lock locks q for a change. What it returns unlocks q and wakes all who wait for that.
func (q *queue) lock() (unlock func()) {
	q.mu.Lock()
	return func() {
		q.changed.Broadcast()
		q.mu.Unlock()
	}
}

// close ends the queue: nothing more is put.
func (q *queue) close() {
	defer q.lock()()
	close(q.closed)
}

func (q *queue) isClosed() bool {
	select {
	case <-q.closed:
		return true
	default:
		return false
	}
}

// put queues metrics. If there is no room, the oldest are dropped.
func (q *queue) put(metrics []metric) {
	defer q.lock()()
	soon := len(q.line.batches) == 0 // their turn comes at once
	for some := range slices.Chunk(metrics, maxBatch) {
		if b := q.line.add(some); !soon {
			b.shrink()
		}
	}
	q.line.shrink()
	q.disk.rests = false
	q.bound()
	q.log.Debug("queued", "metrics", len(metrics), q.state())
}

// bound drops the oldest batches until the rest fits. As all that does not lock, it is called with
// mu held.
func (q *queue) bound() {
	lost, f := q.line.drop(q.limit), &q.figures
	if len(lost) == 0 {
		return
	}
	if f.untold == 0 {
		f.from = lost[0].oldest
	}
	for _, b := range lost {
		f.dropped += uint64(b.count)
		f.untold += uint64(b.count)
		f.until = b.oldest
		q.discard(b.file)
	}
	if f.news.isAllowed("no room") {
		q.tellLosses()
	}
}

func (q *queue) tellLosses() {
	if f := &q.figures; f.untold > 0 {
		q.log.Error("no room for more metrics, dropping the oldest", "metrics", f.untold,
			"from", inUTC(f.from), "until", inUTC(f.until),
			"limit", units.BytesSize(float64(q.limit)))
		f.untold = 0
	}
}

// discard has f removed, if it is a file. That may make room for others.
func (q *queue) discard(f file) {
	if f.name != "" {
		q.disk.litter = append(q.disk.litter, f)
		q.disk.rests = false
	}
}

// turn returns the batch whose turn it is, nil if none can be sent now, and whether it has to wait
// until the disk has written or read it.
func (q *queue) turn() (b *batch, isOwed bool) {
	d := &q.disk
	isStuck := !d.busy.IsZero() && time.Since(d.busy) >= storeWait
	owes := func(b *batch) bool {
		return d.isOpen && !isStuck && !d.ends &&
			(d.trouble == nil && !b.isStored() || b.body == nil)
	}
	b = q.line.first(func(b *batch) bool { return !b.isOut && (b.body != nil || owes(b)) })
	return b, b != nil && owes(b)
}

// next waits for the batch whose turn it is, and hands it out with its body. It returns nil when
// none can be sent and the queue is closed or, with atOnce, open.
func (q *queue) next(atOnce bool) (b *batch, body []byte) {
	defer q.lock()()
	for {
		q.progress = time.Now()
		b, isOwed := q.turn()
		switch {
		case b != nil && !isOwed:
			return b, b.takeOut()
		case b == nil && (atOnce || q.isClosed()):
			return nil, nil
		case isOwed:
			tooLong := time.AfterFunc(storeWait, func() { q.lock()() })
			q.changed.Wait()
			tooLong.Stop()
		default:
			q.changed.Wait()
		}
	}
}

// requested takes note of a request with so many metrics. What fails is sent again.
func (q *queue) requested(metrics int, err error) {
	defer q.lock()()
	q.progress = time.Now()
	if err != nil {
		q.figures.retried += uint64(metrics)
	}
}

// posted ends the trouble: b was accepted, but stays until it is done.
func (q *queue) posted(b *batch) {
	defer q.lock()()
	q.line.goOn()
	b.shrink()
}

// done takes b off the queue, of which so many metrics were bad, and ends the trouble. It reports
// whether no batch is late any more.
func (q *queue) done(b *batch, bad int, took time.Duration) (over bool) {
	defer q.lock()()
	q.line.goOn()
	q.line.remove(b)
	q.discard(b.file)
	q.figures.sent += uint64(b.count - bad)
	q.figures.dropped += uint64(bad)
	q.log.Debug("delivered", "metrics", b.count-bad,
		"took", took.Round(time.Millisecond), q.state())
	if over = !q.line.hasLate(); over {
		q.tellLosses()
	}
	return over
}

// putBack ends the delivery of b, of which left is still to be delivered, nil for all of it, and so
// many metrics were bad. b is late now, and in trouble so is everything else.
func (q *queue) putBack(b *batch, left []byte, bad int, trouble string) {
	defer q.lock()()
	q.figures.sent += uint64(b.putBack(left) - bad)
	q.figures.dropped += uint64(bad)
	q.line.delay(b, trouble)
}

// hasFresh reports whether a fresh batch waits.
func (q *queue) hasFresh() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.line.first(func(b *batch) bool { return !b.isOut && !b.isLate }) != nil
}

// useSpool keeps the queue in s as well, and queues what an earlier run left there. A folder that
// will never do is an error; one that does not work now may do so later, which is logged.
func (q *queue) useSpool(s *spool) error {
	q.spool = s
	err, _ := inTime(storeWait, func() error {
		defer q.lock()()
		return q.open()
	})
	if isPermanent(err) {
		return err
	}
	go q.keep()
	return nil
}

// inTime returns what do returns. If that takes too long, do goes on by itself, and ok is false.
func inTime[T any](within time.Duration, do func() T) (result T, ok bool) {
	done := make(chan T, 1)
	go func() { done <- do() }()
	select {
	case result = <-done:
		return result, true
	case <-time.After(within):
		return result, false
	}
}

// keep gives the disk one thing after the other to do: first of all what delivery waits for. It
// returns after end, when everything is stored or the disk fails.
func (q *queue) keep() {
	defer close(q.kept)
	defer q.lock()()
	for d := &q.disk; ; {
		b, isOwed := q.turn()
		unstored := q.line.first(func(b *batch) bool { return !b.isStored() })
		switch {
		case isOwed && b.isStored():
			q.read(b)
		case isOwed:
			q.write(b)
		case !d.rests && !d.isOpen:
			_ = q.open()
		case !d.rests && len(d.litter) > 0:
			_ = q.onDisk(func() error { return nil })
		case !d.rests && unstored != nil:
			q.write(unstored)
		case d.ends:
			_ = q.onDisk(q.spool.close)
			return
		default:
			d.rests = true
			q.report()
			q.changed.Wait()
		}
	}
}

// report logs that the spool fails, or works again, if that is news. Why does not count: it can
// have another file's name in it each time.
func (q *queue) report() {
	switch err := q.disk.trouble; {
	case err != nil && q.disk.news.isNew("failed"):
		q.log.Error("cannot use the spool, keeping metrics in memory", "error", errorText(err))
	case err == nil && q.disk.news.isNew(""):
		q.log.Info("the spool works again")
	}
}

// onDisk lets the disk remove litter, and do something. q is not locked meanwhile.
func (q *queue) onDisk(do func() error) error {
	d := &q.disk
	litter := d.litter
	d.litter, d.busy = nil, time.Now()
	q.mu.Unlock()
	q.works.Lock()
	for _, f := range litter {
		q.spool.remove(f.name)
	}
	err := do()
	q.mu.Lock() // first, so that results are taken note of in their order
	q.works.Unlock()
	d.busy, d.rests = time.Time{}, err != nil
	q.changed.Broadcast()
	return err
}

// open opens the spool and queues what is in it.
func (q *queue) open() error {
	var found []file
	err := q.onDisk(func() (err error) {
		found, err = q.spool.open()
		return err
	})
	q.disk.isOpen, q.disk.trouble = err == nil, err
	if len(found) > 0 {
		q.log.Info("metrics of an earlier run wait in the spool",
			"metrics", q.line.addFound(found),
			"batches", len(found), "since", inUTC(found[0].oldest))
		q.bound()
	}
	return err
}

func (q *queue) write(b *batch) {
	body, count, f := b.body, b.count, file{}
	_, held := q.line.size()
	err := q.onDisk(func() (err error) {
		q.spool.makeRoom(held, q.limit)
		f, err = q.spool.write(pack(body), b.oldest, count, "")
		return err
	})
	q.disk.trouble = err
	switch {
	case err != nil:
	case slices.Contains(q.line.batches, b):
		b.hasWritten(f)
		q.line.shrink()
		q.bound()
	default: // it was delivered or dropped meanwhile
		q.discard(f)
	}
}

func (q *queue) read(b *batch) {
	f, body := b.file, []byte(nil)
	err := q.onDisk(func() (err error) {
		body, err = q.spool.read(f)
		return err
	})
	switch {
	case err != nil:
		q.disk.isOpen, q.disk.trouble = false, err
	case body != nil:
		b.hasRead(body)
	case slices.Contains(q.line.batches, b): // its file was set aside
		q.line.remove(b)
		q.figures.dropped += uint64(b.count)
	}
}

// setAside keeps refused metrics in a file of the spool. It returns the file's name, "" if there is
// none, or if the disk hangs.
func (q *queue) setAside(body []byte, oldest int64) (name string) {
	if q.spool == nil {
		return ""
	}
	f, _ := inTime(storeWait, func() file {
		q.works.Lock()
		defer q.works.Unlock()
		f, _ := q.spool.write(pack(body), oldest, countOf(body), badSuffix)
		return f
	})
	return f.name
}

// end stores what the disk did not take before, and lets others have the spool. What was dropped is
// in the log then.
func (q *queue) end() {
	unlock := q.lock()
	q.tellLosses()
	q.disk.ends, q.disk.rests = true, false
	unlock()
	if q.spool == nil {
		return
	}
	select {
	case <-q.kept:
	case <-time.After(storeWait):
	}
}

// left returns how many metrics have files, how many have none, and how many were dropped.
func (q *queue) left() (inFiles, inMemory, dropped int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, b := range q.line.batches {
		if b.isStored() {
			inFiles += b.count
		} else {
			inMemory += b.count
		}
	}
	return inFiles, inMemory, int(q.figures.dropped)
}

// hangs reports whether a request takes much longer than any may.
func (q *queue) hangs() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	out := q.line.first(func(b *batch) bool { return b.isOut })
	return out != nil && time.Since(q.progress) > maxFlight
}

// own returns the queue's own metrics, for the host with this name in its metrics.
func (q *queue) own(host string, at time.Time) []metric {
	q.mu.Lock()
	defer q.mu.Unlock()
	now := at.Unix()
	_, bytes := q.line.size()
	return []metric{
		{host, ".metrics.sent", whole(q.figures.sent), now},
		{host, ".metrics.retried", whole(q.figures.retried), now},
		{host, ".metrics.dropped", whole(q.figures.dropped), now},
		{host, ".metrics.spooled", whole(uint64(bytes)), now},
	}
}

func (q *queue) state() slog.Attr {
	metrics, bytes := q.line.size()
	return slog.Group("queue", "metrics", metrics, "batches", len(q.line.batches), "bytes", bytes)
}

// backlog returns what waits, the time of the oldest metric if any is late, and why they wait.
func (q *queue) backlog() (metrics int, bytes int64, since, trouble string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	metrics, bytes = q.line.size()
	if q.line.hasLate() {
		since = inUTC(q.line.batches[0].oldest)
	}
	return metrics, bytes, since, q.line.trouble
}
