package main

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// maxBatch is how many metrics a batch has at most: Backstop needs 50 ms for them.
	maxBatch = 5_000
	// maxBody bounds a batch in bytes. maxBatch metrics of the longest names are less, so a file
	// that unpacks to more is not one of ours.
	maxBody = 16 << 20
)

// diskBlock is what a file takes at least: the limit is one of room on the disk.
const diskBlock = 4 << 10

// batch is kept and delivered as one: the metrics of a sweep, or a part of a large sweep.
type batch struct {
	body   []byte    // what is still to be delivered, as encode wrote it; nil while it has to wait
	packed []byte    // the same, packed; nil if it was never needed, or if the file has just that
	file   string    // its file in the spool, "" if it is in memory only
	extra  bool      // whether the file has more: metrics that are delivered
	size   int64     // bytes that it takes up in the spool, or in memory
	count  int       // metrics that are still to be delivered
	oldest int64     // the oldest time among its metrics, in Unix seconds
	tried  bool      // whether it was posted before
	put    time.Time // when it was queued, zero for one that was found in the spool

	pending time.Time // when the delivery began that is to be confirmed, zero for none
}

func newBatch(metrics []metric) *batch {
	body := encode(metrics)
	oldest := slices.MinFunc(metrics, func(a, b metric) int { return cmp.Compare(a.time, b.time) })
	return &batch{body: body, size: int64(len(body)), count: len(metrics), oldest: oldest.time,
		put: time.Now()}
}

// pack makes sure that b can do without its body, in memory or, with toDisk, until it has a file.
func (b *batch) pack(toDisk bool) {
	if b.packed != nil || b.file != "" {
		return
	}
	b.packed = pack(b.body)
	packed := int64(len(b.packed))
	b.size = packed + packed/2 + 512 // the garbage collector needs some room: see tuneCollector
	if toDisk {
		b.size = max(b.size, onDisk(packed))
	}
}

// onDisk returns what a file of so many bytes takes of the disk.
func onDisk(bytes int64) int64 {
	return max(1, (bytes+diskBlock-1)/diskBlock) * diskBlock
}

// collectsOften is whether Go's garbage collector has less room than usual.
var collectsOften atomic.Bool

// tuneCollector lets Go's garbage collector run more often, if so many bytes are in memory that its
// usual room, as much again, would be too much. A change stops the process for a moment.
func tuneCollector(held int64) {
	often := held >= 16<<20
	if os.Getenv("GOGC") != "" || collectsOften.Swap(often) == often {
		return
	}
	debug.SetGCPercent(map[bool]int{false: 100, true: 25}[often]) // 100 is Go's default
}

// gzipWriters keeps the megabyte that packing needs.
var gzipWriters = sync.Pool{New: func() any {
	w, _ := gzip.NewWriterLevel(nil, gzip.BestSpeed) // fails for unknown levels only
	return w
}}

// pack gzips body. At the fastest level, metrics shrink to an eighth.
func pack(body []byte) []byte {
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
