package main

import (
	"cmp"
	"fmt"
	"iter"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/docker/go-units"
)

// maxBatch is how many metrics go into one request: Backstop needs 50 ms for them.
const maxBatch = 5_000

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
	rest  func() // called when everything is delivered, nil for nothing; it may ask the queue
	log   *slog.Logger

	mu       sync.Mutex
	packer   packer
	late     []*batch // oldest first
	fresh    []*batch // likewise; all are younger than the late ones
	inFlight *batch   // the one of them that deliver is busy with
	ending   bool     // whether deliver knows that the queue is closed
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

	// What deliver knows of Backstop
	largest      int    // metrics that a request may have
	taken        int    // requests since that was learned, or tried
	good         []byte // a request of one metric that was taken, nil while there is none
	refused      int    // requests, since refusedSince
	refusedSince time.Time
	ordinal      part // 0, 1, 2 … as far as needed
}

// batch is what is kept as one: a sweep, or a part of a large one.
type batch struct {
	file    string    // in the spool, "" while it is in memory
	packed  []byte    // its body, where it is neither in a file nor sent at once
	body    []byte    // the same unpacked, nil where it had to wait
	size    int64     // bytes where it is kept
	count   int       // metrics in it
	metrics int       // of them that are still to be delivered
	oldest  int64     // Unix seconds
	tried   bool      // without success
	unread  int       // how often its file could not be read
	setBack int       // how often it was refused altogether: others go first
	rests   time.Time // until when others go first

	// What became of its metrics, where some were refused
	left     part  // what is to be posted still, nil: everything
	refused  part  // what was refused, each on its own
	refusal  error // of the last of those
	rounds   int   // in how many rounds they were
	accepted int   // how many were not
}

// outage is a time in which metrics have to wait.
type outage struct {
	failing   bool     // whether there is trouble, still
	over      string   // what to log when it is over
	told      []string // what was logged of it
	delivered int      // metrics since it began
	oldest    int64    // of them, in Unix seconds
	dropped   loss     // what was given up since it began
}

// loss is of metrics in a span of times, in Unix seconds.
type loss struct {
	metrics     int
	from, until int64
}

// add adds metrics of a batch.
func (l *loss) add(metrics int, oldest int64) {
	if l.metrics == 0 {
		l.from = oldest
	}
	l.metrics += metrics
	l.until = oldest
}

func (l loss) attr() slog.Attr {
	return slog.Group("given_up", "metrics", l.metrics, "from", inUTC(l.from), "until", inUTC(l.until))
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
	if isForGood(err) {
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
		q.inOutage("metrics of the earlier run are delivered")
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
		{host, ".metrics.sent", whole(q.figures.sent), now},
		{host, ".metrics.retried", whole(q.figures.retried), now},
		{host, ".metrics.dropped", whole(q.figures.dropped), now},
		{host, ".metrics.spooled", whole(uint64(q.bytes)), now},
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
	b := &batch{
		body:    q.to.encode(metrics),
		count:   len(metrics),
		metrics: len(metrics),
		oldest:  slices.MinFunc(metrics, func(a, b metric) int { return cmp.Compare(a.time, b.time) }).time,
	}
	b.size = int64(len(b.body))
	q.metrics += b.metrics
	q.bytes += b.size
	if !soon || q.spool != nil || q.bytes > q.limit {
		q.pack(b)
	}
	if !soon {
		b.body = nil
	}
	if q.outage != nil && q.outage.failing {
		q.late = append(q.late, b)
	} else {
		q.fresh = append(q.fresh, b)
	}
}

// pack packs a batch, if it is not packed yet. It is called with mu held.
func (q *queue) pack(b *batch) {
	if b.packed != nil || b.file != "" {
		return
	}
	b.packed = q.packer.pack(b.body)
	q.bytes -= b.size
	b.size = int64(len(b.packed))
	if q.spool != nil {
		b.size = onDisk(b.size)
	}
	q.bytes += b.size
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
		q.room.add(oldest.metrics, oldest.oldest)
		if q.outage != nil {
			q.outage.dropped.add(oldest.metrics, oldest.oldest)
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
	if q.spool.isOpen() {
		if err := q.spool.check(); err != nil {
			q.closeSpool(err)
		}
	}
	var err error
	works := false // whether there was anything to find out by
	if !q.spool.isOpen() {
		err = q.openSpool()
		works = err == nil
	}
	if err == nil {
		q.spool.tidy()
		for b := range q.all() {
			if b.file == "" && b != q.inFlight {
				if err = q.spool.write(b); err != nil {
					break
				}
				works = true
			}
		}
	}
	if err != nil || works {
		q.tellDisk(err)
	}
}

// closeSpool stops using the folder, because of err, until it can be opened again. It is called with mu held.
func (q *queue) closeSpool(err error) {
	if q.spool.isOpen() {
		q.spool.close()
		q.tellDisk(err)
	}
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

// describe says in a few words what is in the queue.
func (q *queue) describe() string {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.metrics == 0 {
		return "empty"
	}
	text := fmt.Sprintf("%d metrics", q.metrics)
	if o := q.outage; o != nil && len(q.late) > 0 {
		text += " since " + inUTC(q.late[0].oldest)
		if len(o.told) > 0 {
			text += ", " + o.told[len(o.told)-1]
		}
	}
	return text
}

// inUTC is a time as the log has it.
func inUTC(seconds int64) string { return time.Unix(seconds, 0).UTC().Format(time.RFC3339) }
