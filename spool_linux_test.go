package main

import (
	"slices"
	"syscall"
	"testing"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
)

// Without file descriptors, no file is to blame: the folder is not used for a while.
func TestSpoolSurvivesALackOfDescriptors(t *testing.T) {
	down := true
	r := &receiver{fail: unreachableWhile(&down)}
	q, log := r.spooled(t, newDir(t))
	q.put(points(0, 1))
	q.put(points(1, 1))
	q.try(t)
	log.Take()
	var usual syscall.Rlimit
	harness.Must(t, syscall.Getrlimit(syscall.RLIMIT_NOFILE, &usual))
	set := func(most uint64) {
		limit := usual
		limit.Cur = most
		harness.Must(t, syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit))
	}
	t.Cleanup(func() { set(usual.Cur) })
	set(3)
	q.put(points(2, 1))
	b, _ := q.next(true)
	if b != nil && b.isStored() {
		t.Errorf("%s was read", b.file.name)
	}
	if b != nil {
		q.putBack(b, nil, 0, "")
	}
	set(usual.Cur)
	q.put(nil) // it works again
	logged(t, log, 2, diskTold, syscall.EMFILE.Error(), diskBack)
	down = false
	deliverAll(t, q)
	slices.Sort(r.got)
	r.inOrder(t, 0, 3)
}
