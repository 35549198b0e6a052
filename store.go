package main

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"
)

// store keeps the queue's batches in the spool as well. Sampling never waits for it: keep runs in a
// goroutine of its own, and the queue is not locked while the disk works.
type store struct {
	queue *queue

	mu    sync.Mutex // held while the disk works
	spool *spool     // nil: everything is in memory only
	ended bool

	// Of delivery's goroutine
	reading *fileRead // nil: none
	news    news      // of slow disks
}

// newStore keeps what is in q in s, if s is not nil, and queues what an earlier run left there. A
// folder that will never do is an error; one that does not work now may do so later, which is
// logged.
func newStore(q *queue, s *spool) (*store, error) {
	st := &store{queue: q, spool: s}
	if s == nil {
		return st, nil
	}
	st.useDisk(false, true)
	err, _ := inTime(storeWait, func() error {
		st.mu.Lock()
		defer st.mu.Unlock()
		err := st.open()
		st.useDisk(s.isOpen(), err == nil)
		if !isPermanent(err) {
			s.report(err)
		}
		return err
	})
	if isPermanent(err) {
		return nil, err
	}
	return st, nil
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

// open opens the spool's folder and queues what is in it. It is called with mu held.
func (st *store) open() error {
	found, err := st.spool.open(st.files())
	if err == nil && len(found) > 0 {
		st.putFound(found)
	}
	return err
}

// keep updates the spool whenever the queue has changed. It never returns.
func (st *store) keep() {
	for range st.queue.unstored {
		st.update()
	}
}

// update writes what is in memory only into the spool, and removes the files of what is done. What
// a disk does not take stays in memory, until the next time.
func (st *store) update() {
	if st.spool == nil {
		return
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.ended {
		return
	}
	err := st.spool.check()
	tried := err != nil // whether there was anything to find out by
	if tried {
		st.spool.fail(err)
		err = st.open()
	}
	for err == nil {
		st.spool.tidy()
		for _, f := range st.takeLitter() {
			st.spool.remove(f)
		}
		st.spool.makeRoom(st.room())
		b, packed, count := st.nextToStore()
		if b == nil {
			break
		}
		tried = true
		var f file
		if f, err = st.spool.write(packed, b.oldest, count); err == nil {
			st.hasStored(b, f, packed)
		}
	}
	if tried {
		st.spool.report(err)
	}
	st.useDisk(st.spool.isOpen(), err == nil)
}

// errAway is the error of a file that cannot be read now, but perhaps later.
var errAway = errors.New("the spool cannot be read")

// load returns the body of b. The error is errAway, that of ctx, or that of b, which is set aside.
func (st *store) load(ctx context.Context, b *batch) ([]byte, error) {
	body, packed, f := st.content(b)
	switch {
	case body != nil:
		return body, nil
	case packed != nil:
		return unpack(packed)
	}
	body, err := st.read(ctx, f.name)
	switch {
	case err == nil:
		st.hasRead(b, countOf(body))
		return body, nil
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case !errors.Is(err, errAway) && st.isSpoilt(f, b.count, err):
		return nil, err
	}
	st.useDisk(false, false)
	return nil, errAway
}

// isSpoilt reports whether err, from reading f with so many metrics, is about that file only, and
// sets that aside. Else the folder is closed, or its disk hangs.
func (st *store) isSpoilt(f file, metrics int, err error) bool {
	trouble, ok := locked(st, func() error {
		trouble := st.spool.trouble(err)
		if trouble == nil {
			st.spool.setAside(f, metrics, err)
		} else {
			st.spool.fail(trouble)
		}
		return trouble
	})
	return ok && trouble == nil
}

// fileRead is the reading of a file, which is under way.
type fileRead struct {
	name string
	done chan readResult
}

type readResult struct {
	body []byte
	err  error
}

// read reads a file. If that takes long, the error is errAway, and the next call waits for the same
// reading: there is one at a time.
func (st *store) read(ctx context.Context, name string) ([]byte, error) {
	late := time.After(storeWait)
	for {
		r := st.reading
		if r == nil {
			r = &fileRead{name, make(chan readResult, 1)}
			st.reading = r
			go func() {
				body, err := st.spool.read(name)
				r.done <- readResult{body, err}
			}()
		}
		select {
		case result := <-r.done:
			if st.reading = nil; r.name == name {
				st.news.isNew("")
				return result.body, result.err
			}
		case <-late:
			if st.news.isNew("slow") {
				st.queue.log.Warn("the disk of the spool is slow, waiting for a file", "file", name)
			}
			return nil, errAway
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// locked calls do with mu locked and returns its result. If the disk is busy for long, do is not
// called; if do hangs, it goes on by itself. ok is false in both cases.
func locked[T any](st *store, do func() T) (result T, ok bool) {
	end := time.Now().Add(storeWait)
	for ; !st.mu.TryLock(); time.Sleep(storeWait / 100) {
		if time.Now().After(end) {
			return result, false
		}
	}
	return inTime(time.Until(end), func() T {
		defer st.mu.Unlock()
		return do()
	})
}

// setAside keeps refused metrics in a file of the spool. It returns the file's name, "" if there is
// none, or if the disk hangs.
func (st *store) setAside(body []byte, oldest int64) (name string) {
	if st.spool == nil {
		return ""
	}
	name, _ = locked(st, func() string {
		return st.spool.writeBad(pack(body), oldest, countOf(body))
	})
	return name
}

// end stores what the disk did not take before, and lets others have the spool. It returns how many
// metrics are kept there, how many of these were sent and not confirmed, and how many are lost.
func (st *store) end() (kept, pending, lost int) {
	if st.spool != nil {
		inTime(storeWait, func() struct{} {
			st.update()
			st.mu.Lock()
			defer st.mu.Unlock()
			st.ended = true
			st.spool.close()
			return struct{}{}
		})
	}
	return st.left()
}

// The rest is what the store does with the queue, which is locked for a moment each time.

// files returns the names of the files that the queue knows.
func (st *store) files() map[string]bool {
	q := st.queue
	q.mu.Lock()
	defer q.mu.Unlock()
	names := map[string]bool{}
	for _, b := range q.batches {
		names[b.file] = true
	}
	for _, f := range q.disk.litter {
		names[f.name] = true
	}
	return names
}

// putFound queues batches that an earlier run left, oldest first.
func (st *store) putFound(found []*batch) {
	q := st.queue
	q.mu.Lock()
	defer q.mu.Unlock()
	before, _ := q.size()
	q.batches = slices.Concat(found, q.batches)
	q.late += len(found)
	all, _ := q.size()
	q.log.Info("metrics of an earlier run wait in the spool",
		"metrics", all-before, "batches", len(found), "since", inUTC(found[0].oldest))
	q.bound()
	notify(q.changed)
}

// useDisk sets whether the spool's files can be read, and whether it takes more.
func (st *store) useDisk(readable, writable bool) {
	q := st.queue
	q.mu.Lock()
	defer q.mu.Unlock()
	q.disk.used, q.disk.readable, q.disk.writable = true, readable, writable
	notify(q.changed)
}

// takeLitter returns the files that are to be removed.
func (st *store) takeLitter() []file {
	q := st.queue
	q.mu.Lock()
	defer q.mu.Unlock()
	litter := q.disk.litter
	q.disk.litter = nil
	return litter
}

// room returns the bytes that the queue takes up, and its limit.
func (st *store) room() (held, limit int64) {
	q := st.queue
	q.mu.Lock()
	defer q.mu.Unlock()
	_, held = q.size()
	return held, q.limit
}

// nextToStore returns the oldest batch that has no file, and what is to be in it; nil for none.
func (st *store) nextToStore() (b *batch, packed []byte, count int) {
	q := st.queue
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, b := range q.batches {
		if b.file == "" && b.packed != nil {
			return b, b.packed, b.count
		}
	}
	return nil, nil, 0
}

// hasStored gives b its file, which has what is packed.
func (st *store) hasStored(b *batch, f file, packed []byte) {
	q := st.queue
	q.mu.Lock()
	defer q.mu.Unlock()
	if !slices.Contains(q.batches, b) { // it was delivered meanwhile
		q.disk.litter = append(q.disk.litter, f)
		return
	}
	b.file, b.size, b.extra = f.name, f.size, &b.packed[0] != &packed[0]
	if b != q.inFlight && !b.extra {
		b.packed = nil
	}
	notify(q.changed)
}

// hasAll reports whether everything in the queue has a file.
func (st *store) hasAll() bool {
	q := st.queue
	q.mu.Lock()
	defer q.mu.Unlock()
	return !slices.ContainsFunc(q.batches, func(b *batch) bool { return b.file == "" })
}

// left returns how many metrics have files, how many of these are pending, and how many have none.
func (st *store) left() (inFiles, pending, inMemory int) {
	q := st.queue
	q.mu.Lock()
	defer q.mu.Unlock()
	q.logLoss(true)
	for _, b := range q.batches {
		if b.file == "" {
			inMemory += b.count
			continue
		}
		inFiles += b.count
		if !b.pending.IsZero() {
			pending += b.count
		}
	}
	return inFiles, pending, inMemory
}

// hasRead corrects the number of metrics in b: the name of its file may be wrong.
func (st *store) hasRead(b *batch, metrics int) {
	q := st.queue
	q.mu.Lock()
	defer q.mu.Unlock()
	b.count = metrics
}

// content returns what there is of b: its body, the same packed, or its file.
func (st *store) content(b *batch) (body, packed []byte, f file) {
	q := st.queue
	q.mu.Lock()
	defer q.mu.Unlock()
	return b.body, b.packed, file{b.file, b.size}
}
