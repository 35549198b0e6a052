package main

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
)

const (
	// maxBatch is how many metrics a batch has at most: Backstop needs 50 ms for them.
	maxBatch = 5_000
	// maxBody bounds a body in bytes. maxBatch metrics of the longest names are less, so a file
	// that unpacks to more is not from this program.
	maxBody = 16 << 20
	// diskBlock is what a file takes at least: the limit is one of room on the disk.
	diskBlock = 4 << 10
)

// batch is kept and delivered as one: the metrics of a sweep, or a part of a large sweep. These
// are its states; a body is packed while others go first:
//
//	body   file    it is
//	whole  -       new, or the disk fails, hangs or is not used
//	whole  whole   fresh, or next: what was put, or read ahead, is sent without reading it again
//	-      whole   late: it has to be read first
//	part   whole   what is left after a part arrived or was bad; after a crash all is sent again
//	part   -       the same, without a file; if it is written, the file has the part
//
// Each of them may be out: then delivery has the body as well, and posts it, or Carbon has yet to
// confirm it. It is neither handed out again nor dropped.
type batch struct {
	oldest int64  // the oldest time among its metrics, in Unix seconds
	count  int    // metrics that are still to be delivered
	body   []byte // these; nil if only the file has them
	file   file   // in the spool; without a name if there is none
	isLate bool   // whether it waits behind those that are fresh
	isOut  bool   // whether delivery has it
	failed int    // how often delivery failed
}

// file is one in the folder of the spool.
type file struct {
	name    string
	oldest  int64 // the oldest time among its metrics, in Unix seconds
	metrics int
	size    int64 // bytes on the disk
}

func (b *batch) isStored() bool { return b.file.name != "" }

// size returns the bytes that b takes up: on the disk or, if it has no file, in memory, where the
// garbage collector needs some room as well.
func (b *batch) size() int64 {
	if b.isStored() {
		return b.file.size
	}
	n := int64(len(b.body))
	return n + n/2 + 512
}

// shrink keeps as little of b in memory as it can wait with. If the file has more than what is left
// to be delivered, it stays: after a crash, some metrics are sent twice.
func (b *batch) shrink() {
	if b.isStored() && b.file.metrics == b.count {
		b.body = nil
	} else {
		b.body = pack(b.body)
	}
}

// takeOut hands b out for delivery, with its body.
func (b *batch) takeOut() (body []byte) {
	b.isOut, body = true, b.body
	if isPacked(body) {
		body, _ = unpack(body) // pack made it
	}
	return body
}

// putBack ends a delivery after which left is still to be delivered, nil for all of it. It returns
// how many metrics are not any more.
func (b *batch) putBack(left []byte) (gone int) {
	b.isOut = false
	if n := countOf(left); left != nil && n < b.count {
		gone = b.count - n
		b.body, b.count = left, n
	}
	return gone
}

// hasRead takes the body from the file of b. Its name may have another count: users may touch it.
func (b *batch) hasRead(body []byte) {
	b.body, b.count = body, countOf(body)
	b.file.metrics = b.count
}

func (b *batch) hasWritten(f file) { b.file = f }

// line is batches in the order of their age, and whose turn it is.
type line struct {
	batches []*batch // oldest first
	trouble string   // why nothing is delivered, "" if it is; then all are late
}

func (l *line) add(metrics []metric) *batch {
	oldest := slices.MinFunc(metrics, func(a, b metric) int { return cmp.Compare(a.time, b.time) })
	b := &batch{oldest: oldest.time, count: len(metrics), body: encode(metrics),
		isLate: l.trouble != ""}
	l.batches = append(l.batches, b)
	return b
}

// addFound adds what an earlier run left, oldest first, and returns how many metrics that is.
func (l *line) addFound(files []file) (metrics int) {
	found := make([]*batch, len(files))
	for i, f := range files {
		found[i] = &batch{oldest: f.oldest, count: f.metrics, file: f, isLate: true}
		metrics += f.metrics
	}
	l.batches = slices.Concat(found, l.batches)
	return metrics
}

func (l *line) remove(b *batch) {
	l.batches = slices.DeleteFunc(l.batches, func(other *batch) bool { return other == b })
}

func (l *line) hasLate() bool { return len(l.batches) > 0 && l.batches[0].isLate }

// delay makes b late. In trouble b has failed, and all others are late, too.
func (l *line) delay(b *batch, trouble string) {
	b.isLate = true
	if trouble != "" {
		l.trouble = trouble
		b.failed++
	}
	for _, b := range l.batches {
		b.isLate = b.isLate || l.trouble != ""
	}
	l.shrink()
}

// shrink keeps little of what is late in memory, but for the one that goes next.
func (l *line) shrink() {
	next := l.first(func(b *batch) bool { return b.isLate && !b.isOut })
	for _, b := range l.batches {
		if b.isLate && b != next {
			b.shrink()
		}
	}
}

func (l *line) goOn() { l.trouble = "" }

// first returns the first in the order of delivery that isWanted, nil for none. In trouble that is
// the one that failed least often, and of these the newest: a batch with something in it that makes
// the receiver fail holds up no other.
func (l *line) first(isWanted func(*batch) bool) (first *batch) {
	for _, b := range l.batches {
		isBefore := first == nil || first.isLate && !b.isLate
		if l.trouble != "" {
			isBefore = first == nil || b.failed <= first.failed
		}
		if isBefore && isWanted(b) {
			first = b
		}
	}
	return first
}

// size returns what is in l.
func (l *line) size() (metrics int, bytes int64) {
	for _, b := range l.batches {
		metrics += b.count
		bytes += b.size()
	}
	return metrics, bytes
}

// drop takes off the oldest batches until the rest fits, but none that is out: the receiver may
// just have accepted it.
func (l *line) drop(limit int64) (lost []*batch) {
	if _, held := l.size(); held > limit {
		for _, b := range l.batches {
			b.shrink()
		}
	}
	_, held := l.size()
	l.batches = slices.DeleteFunc(l.batches, func(b *batch) bool { // in order, each once
		isLost := held > limit && !b.isOut
		if isLost {
			held -= b.size()
			lost = append(lost, b)
		}
		return isLost
	})
	return lost
}

// roomOf returns what a file of so many bytes takes of the disk.
func roomOf(bytes int64) int64 {
	return max(1, (bytes+diskBlock-1)/diskBlock) * diskBlock
}

// gzipWriters keeps the megabyte that packing needs.
var gzipWriters = sync.Pool{New: func() any {
	w, _ := gzip.NewWriterLevel(nil, gzip.BestSpeed) // fails for unknown levels only
	return w
}}

// isPacked reports whether pack made this. A body begins with a bracket, and gzip with this.
func isPacked(body []byte) bool { return len(body) > 0 && body[0] == 0x1f }

// pack gzips body, unless it is packed. At the fastest level, metrics shrink to an eighth.
func pack(body []byte) []byte {
	if isPacked(body) {
		return body
	}
	w := gzipWriters.Get().(*gzip.Writer)
	defer gzipWriters.Put(w)
	var b bytes.Buffer
	w.Reset(&b)
	w.Write(body) // never fails on a Buffer
	w.Close()
	return bytes.Clone(b.Bytes()) // without the room to grow
}

// unpack undoes pack. Anything cut off or changed is an error.
func unpack(packed []byte) ([]byte, error) {
	r, err := gzip.NewReader(bytes.NewReader(packed))
	if err == nil {
		var body []byte
		if body, err = readAtMost(r, maxBody, errors.New("too large")); err == nil {
			return body, nil
		}
	}
	return nil, fmt.Errorf("not a whole gzip file: %s", strings.TrimPrefix(err.Error(), "gzip: "))
}
