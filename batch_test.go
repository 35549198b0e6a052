package main

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
)

// Waiting batches are packed, but the one that is sent at once.
func TestQueueKeepsNothingUnpacked(t *testing.T) {
	r := &receiver{fail: func(int, []int) error { return errors.New("connection refused") }}
	q, _ := r.queue(t)
	q.put(points(0, 12_000))
	unpacked := func() (n int) {
		for _, b := range q.line.batches {
			if !isPacked(b.body) {
				n += len(b.body)
			}
		}
		return n
	}
	if unpacked() == 0 {
		t.Error("what is sent at once has to be unpacked first")
	}
	for range 3 {
		q.try(t)
		q.put(points(0, 12_000))
	}
	if n := unpacked(); n > 0 {
		t.Errorf("%d bytes are held unpacked", n)
	}
}

// A day of 100 containers at a poll a minute, with long values, fits into the default limit.
func TestSpoolHoldsADay(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	var metrics []metric
	// All that a container can send. TestMetricsAreDocumented shows that this is so.
	names := harness.AllOf("(?m)^\\| `<c>\\.([^`<]+)`", harness.ReadFile(t, "docs/metrics.md"))
	for i := range 100 {
		for _, pattern := range names {
			for _, name := range harness.Expand(pattern) {
				path := fmt.Sprintf("project%d.service%d.%s", i/10, i, name)
				value, at := whole(random.Uint64N(1e12)), 1795409680+int64(i%2)
				metrics = append(metrics, metric{"", path, value, at})
			}
		}
	}
	if len(metrics) < 4000 {
		t.Fatalf("only %d metrics", len(metrics))
	}
	var sweep int64
	for some := range slices.Chunk(metrics, maxBatch) {
		sweep += roomOf(int64(len(pack(encode(some)))))
	}
	if day := sweep * 24 * 60; day > 256<<20 {
		t.Errorf("%d metrics a minute are %d MiB a day", len(metrics), day>>20)
	}
}

// A folder with very many files, more than the limit, holds up neither polls nor the end.
func TestSpoolWithManyFiles(t *testing.T) {
	log := &harness.Log{}
	q := newQueue(1<<20, log.Logger())
	const files = 300_000
	found := make([]file, files)
	for i := range found {
		found[i] = file{name: fmt.Sprint(i), size: diskBlock, metrics: 1, oldest: int64(1 + i)}
	}
	start := time.Now()
	q.line.addFound(found)
	q.bound()
	if took := time.Since(start); took > 5*time.Second { // it took minutes
		t.Errorf("took %s", took)
	}
	const kept = 1 << 20 / diskBlock
	if got := len(q.line.batches); got != kept || q.line.batches[0].file != found[files-kept] ||
		len(q.disk.litter) != files-kept || q.figures.dropped != files-kept {
		t.Errorf("%d are left, %d to be removed, %d dropped", got,
			len(q.disk.litter), q.figures.dropped)
	}
}
