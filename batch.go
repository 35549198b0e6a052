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
	// maxBody bounds a batch in bytes. maxBatch metrics of the longest names are less, so a file
	// that unpacks to more is not one of ours.
	maxBody = 16 << 20
)

// batch is kept and delivered as one: the metrics of a sweep, or a part of a large sweep.
type batch struct {
	body   []byte // what is still to be delivered, as encode wrote it; nil while it has to wait
	packed []byte // the same, packed; nil if it was never needed, or if the file has it all
	file   string // its file in the spool, "" if it is in memory only
	size   int64  // bytes that it takes up in the spool, or in memory
	count  int    // metrics that are still to be delivered
	oldest int64  // the oldest time among its metrics, in Unix seconds
	tried  bool   // whether it was posted before
}

func newBatch(metrics []metric) *batch {
	body := encode(metrics)
	oldest := slices.MinFunc(metrics, func(a, b metric) int { return cmp.Compare(a.time, b.time) })
	return &batch{body: body, size: int64(len(body)), count: len(metrics), oldest: oldest.time}
}

// pack makes sure that b can do without its body.
func (b *batch) pack() {
	if b.packed == nil && b.file == "" {
		b.packed = pack(b.body)
		b.size = int64(len(b.packed))
	}
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
	return b.Bytes()
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
