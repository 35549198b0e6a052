package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
)

// files returns what is in a folder but the lock.
func files(t testing.TB, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	harness.Must(t, err)
	var names []string
	for _, e := range entries {
		if e.Name() != lockName {
			names = append(names, e.Name())
		}
	}
	return names
}

func newDir(t testing.TB) string { return filepath.Join(t.TempDir(), "a", "spool") }

// What is queued is in a file when put returns, and the next run delivers it, oldest first.
func TestSpoolOutlivesItsProcess(t *testing.T) {
	dir := newDir(t)
	q, _ := (&receiver{}).spooled(t, dir)
	q.put(points(0, 5001))
	q.put(points(5001, 2))
	names := files(t, dir)
	if want := []string{"20261123T045440Z-0000000001-5000.json.gz", "20261123T061800Z-0000000002-1.json.gz", "20261123T061801Z-0000000003-2.json.gz"}; !slices.Equal(
		names,
		want,
	) {
		t.Errorf("files %q, want %q", names, want)
	}
	packed, err := os.ReadFile(filepath.Join(dir, names[2]))
	harness.Must(t, err)
	if body, err := unpack(packed); err != nil || !bytes.Equal(body, encode(points(5001, 2))) {
		t.Errorf("%s holds %s %v", names[2], body, err)
	}
	if runtime.GOOS != "windows" {
		for _, path := range []string{dir, filepath.Join(dir, names[0]), filepath.Join(dir, lockName)} {
			if info, err := os.Stat(path); err != nil || info.Mode().Perm()&0o077 != 0 {
				t.Errorf("%s is not private: %v %v", path, info.Mode(), err)
			}
		}
	}
	q.spool.close() // as a kill does

	r := &receiver{}
	q, log := r.spooled(t, dir)
	if got, want := log.Take(), `level=INFO msg="metrics of an earlier run wait in the spool" metrics=5003 batches=3 since=2026-11-23T04:54:40Z`+"\n"; got != want {
		t.Errorf("logged %swant %s", got, want)
	}
	own := asLines(q.own("h", time.Unix(1, 0)))
	if !regexp.MustCompile(`h\.metrics\.spooled \d{5} 1`).MatchString(own) {
		t.Errorf("its own figures are\n%s", own)
	}
	deliverAll(t, q)
	r.inOrder(t, 0, 5003)
	if left := files(t, dir); len(left) != 0 {
		t.Errorf("left %q", left)
	}
	if got := log.Take(); !strings.HasPrefix(
		got,
		`level=INFO msg="metrics of the earlier run are delivered" metrics=5003 last=`,
	) ||
		strings.Count(got, "\n") != 1 {
		t.Errorf("logged %s", got)
	}
	// Names are not used again, not even by the next run.
	q, _ = r.spooled(t, dir)
	q.put(points(0, 1))
	q.spool.close()
	q, _ = r.spooled(t, dir)
	q.put(points(0, 1))
	if n := len(files(t, dir)); n != 2 {
		t.Errorf("%d files of two batches", n)
	}
}

func TestSpoolIsOneDaemons(t *testing.T) {
	dir := newDir(t)
	first, _ := (&receiver{}).spooled(t, dir)
	second, _ := (&receiver{}).queue(t)
	err := useSpool(second, &spool{dir: dir, log: second.queue.log})
	if want := fmt.Sprintf("another docker-stats-to-backstop uses this folder: process %d", os.Getpid()); err == nil ||
		err.Error() != want {
		t.Errorf("error %v, want %s", err, want)
	}
	first.spool.close()
	if err := useSpool(second, &spool{dir: dir, log: second.queue.log}); err != nil {
		t.Error(err)
	}
	second.spool.close()
}

// A file that is not whole costs itself, whatever its length, and one line.
func TestSpoolSurvivesTruncation(t *testing.T) {
	made := newDir(t)
	q, _ := (&receiver{}).spooled(t, made)
	for i := range 3 {
		q.put(points(i*3, 3))
	}
	q.spool.close()
	names := files(t, made)
	bodies := make([][]byte, 3)
	for i, name := range names {
		var err error
		if bodies[i], err = os.ReadFile(filepath.Join(made, name)); err != nil {
			t.Fatal(err)
		}
	}
	for length := range len(bodies[1]) {
		dir := t.TempDir()
		for i, name := range names {
			body := bodies[i]
			if i == 1 {
				body = body[:length]
			}
			harness.Must(t, os.WriteFile(filepath.Join(dir, name), body, 0o600))
		}
		r := &receiver{}
		q, log := r.spooled(t, dir)
		q.close()
		if err := q.deliver(t.Context()); err == nil || err.Error() != "3 metrics not delivered" {
			t.Errorf("%d bytes: %v", length, err)
		}
		if want := []int{0, 1, 2, 6, 7, 8}; !slices.Equal(r.got, want) {
			t.Errorf("%d bytes: arrived %v", length, r.got)
		}
		if got := log.Take(); strings.Count(got, "level=ERROR") != 1 || !strings.Contains(
			got,
			`level=ERROR msg="a spooled file cannot be used; it is set aside" file=`+names[1]+`.bad metrics=3 error="not a whole gzip file: `,
		) {
			t.Errorf("%d bytes: logged %s", length, got)
		}
		if got := figuresOf(q); got != "sent 6, retried 0, dropped 3" {
			t.Errorf("%d bytes: its own figures are %s", length, got)
		}
		if left := files(t, dir); !slices.Equal(left, []string{names[1] + badSuffix}) {
			t.Errorf("%d bytes: left %q", length, left)
		}
	}
}

// Whatever else is in the folder stops neither the start nor the rest.
func TestSpoolSurvivesOthersFiles(t *testing.T) {
	dir := newDir(t)
	q, _ := (&receiver{}).spooled(t, dir)
	q.put(points(0, 2))
	q.put(points(2, 2))
	q.spool.close()
	forged := func(name, body string) {
		harness.Must(t, os.WriteFile(filepath.Join(dir, name), pack([]byte(body)), 0o600))
	}
	bad := map[string]string{
		"20261123T045441Z-0000000011-1.json.gz": `[{"metric":"web.a\nforged.name","value":1,"measure_time":1795409680}]`,
		"20261123T045441Z-0000000012-1.json.gz": `[1]`,
		"20261123T045441Z-0000000013-1.json.gz": `[{"metric":"web.a","value":null,"measure_time":1795409680}]`,
		"20261123T045441Z-0000000014-1.json.gz": `{}`,
		"20261123T045441Z-0000000015-1.json.gz": `[{"metric":"web.a","value":1,"measure_time":1795409680}] and more`,
		"20261123T045441Z-0000000016-1.json.gz": strings.Repeat(" ", maxBody+1),
		"20261399T999999Z-0000000017-1.json.gz": `[]`, // no time
	}
	for name, body := range bad {
		forged(name, body)
	}
	folder := "20261123T045441Z-0000000018-9.json.gz"
	harness.Must(t, os.MkdirAll(filepath.Join(dir, folder, "x"), 0o700))
	bad[folder] = ""
	// What was under way when a daemon was killed goes; others' files stay, and what was set aside
	// before.
	forged(".20261123T045441Z-0000000019-1.json.gz12345", "")
	others := []string{"20261123T045441Z-0000000001-2.json.gz.bad", "lost+found", "notes.txt"}
	forged(others[0], "")
	forged(others[1], "")
	forged(others[2], "mine")

	r := &receiver{}
	q, log := r.spooled(t, dir)
	q.close()
	if err := q.deliver(t.Context()); err == nil {
		t.Error("no error for what was lost")
	}
	r.inOrder(t, 0, 4)
	lines := log.Take()
	for name := range bad {
		if strings.Count(lines, "file="+name+".bad ") != 1 {
			t.Errorf("%s is not told once:\n%s", name, lines)
		}
		others = append(others, name+badSuffix)
	}
	slices.Sort(others)
	if left := files(t, dir); !slices.Equal(left, others) {
		t.Errorf("left\n%q, want\n%q", left, others)
	}
	if !strings.Contains(
		lines,
		`level=WARN msg="the spool folder has files of others, which are left alone" files=2 such_as=lost+found`,
	) {
		t.Errorf("logged\n%s", lines)
	}
}

// An operator may have delivered a file by hand, and removed it.
func TestSpoolSurvivesRemovedFiles(t *testing.T) {
	dir := newDir(t)
	r := &receiver{fail: func(try int, _ []int) error {
		if try == 1 {
			return errors.New("connection refused")
		}
		return nil
	}}
	q, log := r.spooled(t, dir)
	q.pace = pace{time.Millisecond, time.Millisecond, time.Millisecond}
	for i := range 4 {
		q.put(points(i, 1))
	}
	for _, name := range files(t, dir)[1:3] {
		harness.Must(t, os.Remove(filepath.Join(dir, name)))
	}
	if err := q.try(t); err == nil {
		t.Fatal("no failure")
	}
	q.close()
	if err := q.deliver(t.Context()); err == nil || err.Error() != "2 metrics not delivered" {
		t.Error(err)
	}
	if !slices.Equal(r.got, []int{0, 3}) {
		t.Errorf("arrived %v", r.got)
	}
	if got := log.Take(); strings.Count(
		got,
		`level=ERROR msg="a file has gone from the spool, and its metrics with it" `,
	) != 1 {
		t.Errorf("logged\n%s", got)
	}
}

// A folder that cannot be read for a while costs nothing: what is in it waits, what is in memory
// does not.
func TestSpoolSurvivesAnAbsenceOfItsFolder(t *testing.T) {
	dir := newDir(t)
	down := true
	r := &receiver{fail: func(int, []int) error {
		if down {
			return errors.New("connection refused")
		}
		return nil
	}}
	q, log := r.spooled(t, dir)
	for i := range 3 {
		q.put(points(i, 1))
	}
	q.try(t)
	log.Take()
	// Whatever is done with it fails from here on.
	away := dir + " away"
	harness.Must(t, os.Rename(dir, away))
	harness.Must(t, os.Symlink(filepath.Base(dir), dir))
	down = false
	if err := q.try(t); err != nil {
		t.Errorf("%v: something else may be sent", err)
	}
	if b, _ := q.turn(false); b != nil {
		t.Errorf("%s cannot be read", b.file)
	}
	q.put(points(3, 1))
	if err := q.try(t); err != nil {
		t.Error(err)
	}
	if !slices.Equal(r.got, []int{3}) {
		t.Errorf("arrived %v", r.got)
	}
	if got := log.Take(); strings.Count(got, "\n") != 1 ||
		!strings.Contains(
			got,
			`msg="the spool cannot be used; metrics are kept in memory until it can" error=`,
		) {
		t.Errorf("logged\n%s", got)
	}
	harness.Must(t, errors.Join(os.Remove(dir), os.Rename(away, dir)))
	q.put(points(4, 1))
	deliverAll(t, q)
	if slices.Sort(r.got); !slices.Equal(r.got, []int{0, 1, 2, 3, 4}) {
		t.Errorf("arrived %v", r.got)
	}
	if got := log.Take(); !strings.Contains(got, `msg="the spool can be used again"`) ||
		strings.Contains(got, "ERROR") {
		t.Errorf("logged\n%s", got)
	}
	if left := files(t, dir); len(left) != 0 {
		t.Errorf("left %q", left)
	}
}

// Out of file descriptors, no file is to blame: the folder is not used for a while.
func TestSpoolSurvivesTheWantOfDescriptors(t *testing.T) {
	r := &receiver{fail: func(int, []int) error { return errors.New("connection refused") }}
	q, log := r.spooled(t, newDir(t))
	q.put(points(0, 1))
	q.put(points(1, 1))
	q.try(t)
	for _, err := range []error{syscall.EMFILE, syscall.ENFILE} {
		trouble := q.spool.trouble(&fs.PathError{Op: "open", Path: q.spool.dir, Err: err})
		if !errors.Is(trouble, err) {
			t.Errorf("%v counts as the file's trouble", err)
		}
		q.spool.fail(trouble)
		q.store.useDisk(false, false)
		if b, _ := q.turn(false); b != nil {
			t.Errorf("%s is tried at once", b.file)
		}
		q.put(nil) // it works again
	}
	got := log.Take()
	for _, want := range []string{"the spool cannot be used", syscall.EMFILE.Error(), "the spool can be used again"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %s in\n%s", want, got)
		}
	}
	r.fail = nil
	deliverAll(t, q)
	r.inOrder(t, 0, 2)
}

// Two daemons on one folder are noticed, even if somebody has removed the lock, or the folder; and
// none takes a file of the other.
func TestSpoolNoticesAnotherDaemon(t *testing.T) {
	for _, remove := range []string{lockName, "."} {
		dir := newDir(t)
		one := &receiver{}
		first, log := one.spooled(t, dir)
		first.put(points(0, 1))
		first.next() // it is under way, in memory
		harness.Must(t, os.RemoveAll(filepath.Join(dir, remove)))
		other := &receiver{}
		second, _ := other.spooled(t, dir)
		second.put(points(100, 1))
		before := files(t, dir)
		for i := range 3 {
			first.put(points(1+i, 1))
		}
		if after := files(t, dir); !slices.Equal(after, before) {
			t.Errorf("files %q, before %q", after, before)
		}
		if got := log.Take(); strings.Count(got, "\n") != 1 ||
			!strings.Contains(
				got,
				`msg="the spool cannot be used; metrics are kept in memory until it can" error="`,
			) {
			t.Errorf("logged\n%s", got)
		}
		deliverAll(t, second)
		deliverAll(t, first)
		if slices.Sort(one.got); !slices.Equal(one.got, []int{0, 1, 2, 3}) ||
			!slices.Contains(other.got, 100) {
			t.Errorf("arrived %v and %v", one.got, other.got)
		}
	}
}

// Somebody else may make the same folder, or one above it, at the same time.
func TestMakeFolderIsNotAlone(t *testing.T) {
	in := t.TempDir()
	for i := range 200 {
		above := filepath.Join(in, fmt.Sprint(i), "x", "y")
		var wg sync.WaitGroup
		for j := range 2 {
			wg.Go(func() {
				if err := makeFolder(filepath.Join(above, fmt.Sprint(j))); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
}

// A file that is there is not replaced, whoever made it.
func TestSpoolReplacesNoFile(t *testing.T) {
	dir := newDir(t)
	q, _ := (&receiver{}).spooled(t, dir)
	theirs := filepath.Join(dir, "20261123T045440Z-0000000001-1.json.gz")
	harness.Must(t, os.WriteFile(theirs, []byte("theirs"), 0o600))
	q.put(points(0, 1))
	if got, err := os.ReadFile(theirs); err != nil || string(got) != "theirs" {
		t.Errorf("it holds %q, %v", got, err)
	}
	if n := len(files(t, dir)); n != 2 {
		t.Errorf("%d files", n)
	}
}

// usedBy returns the bytes that the files in a folder take of the disk.
func usedBy(t *testing.T, dir string) (bytes int64) {
	t.Helper()
	for _, name := range files(t, dir) {
		if info, err := os.Lstat(filepath.Join(dir, name)); err == nil {
			bytes += onDisk(info.Size())
		}
	}
	return bytes
}

// The files stay within the limit; those of no use go first, then the oldest.
func TestSpoolIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := newDir(t)
		q, _ := (&receiver{}).spooled(t, dir)
		q.put(points(0, 1))
		q.spool.close()
		useless := filepath.Join(dir, "20251123T045441Z-0000000001-1.json.gz.bad")
		harness.Must(t, os.WriteFile(useless, make([]byte, 1<<19), 0o600))
		r := &receiver{}
		q, log := r.spooled(t, dir)
		for i := range 127 {
			q.put(points(1+i, 1))
		}
		if got := log.Take(); strings.Contains(got, "room") || usedBy(t, dir) != q.limit {
			t.Errorf("%d bytes of files, logged %s", usedBy(t, dir), got)
		}
		q.put(points(128, 1))
		if _, err := os.Stat(useless); !errors.Is(err, fs.ErrNotExist) {
			t.Error("useless files are kept at the cost of metrics")
		}
		for i := range 200 {
			q.put(points(129+i, 1))
			if used := usedBy(t, dir); used > q.limit {
				t.Fatalf("%d bytes of files", used)
			}
		}
		if got := log.Take(); strings.Count(got, "\n") != 1 ||
			!strings.Contains(got, "no room for more metrics") {
			t.Errorf("logged %s", got)
		}
		// A limit that was made smaller is kept from the start.
		q.spool.close()
		q, log = (&receiver{}).queue(t)
		q.limit = 1 << 19
		harness.Must(t, useSpool(q, &spool{dir: dir, log: log.Logger()}))
		if used := usedBy(t, dir); used != q.limit {
			t.Errorf("%d bytes of files", used)
		}
		q.to = r.destination()
		deliverAll(t, q)
		r.inOrder(t, 329-128, 329)
	})
}

// A day of 100 containers at a poll a minute, of values as long as they get, fits into the default.
func TestSpoolHoldsADay(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	var metrics []metric
	// As much as a container ever sends; see TestMetricsAreDocumented for where they come from.
	names := harness.AllOf("(?m)^\\| `<c>\\.([^`<]+)`", harness.ReadFile(t, "docs/metrics.md"))
	for i := range 100 {
		for _, name := range names {
			for _, name := range harness.Expand(name) {
				metrics = append(
					metrics,
					metric{
						"",
						fmt.Sprintf("project%d.service%d.%s", i/10, i, name),
						whole(random.Uint64N(1e12)),
						1795409680 + int64(i%2),
					},
				)
			}
		}
	}
	if len(metrics) < 4000 {
		t.Fatalf("only %d metrics", len(metrics))
	}
	var sweep int64
	for some := range slices.Chunk(metrics, maxBatch) {
		sweep += onDisk(int64(len(pack(encode(some)))))
	}
	if day := sweep * 24 * 60; day > 256<<20 {
		t.Errorf("%d metrics a minute are %d MiB a day", len(metrics), day>>20)
	}
}

// BenchmarkDrain delivers a day's backlog of 100 containers, 4,000 metrics a minute, from files to
// a stand-in that throws it away, or to the Backstop at $BENCH_BACKSTOP, a URL as in --backstop.
func BenchmarkDrain(b *testing.B) {
	const sweeps, size = 24 * 60, 4000
	url := os.Getenv("BENCH_BACKSTOP")
	if url == "" {
		s := harness.NewStandIn(b)
		s.Set("", harness.AnswerWith(http.StatusOK, "ok"))
		url = s.URL + "/publish/docker"
	}
	target := mustBackstop(b, url)
	for b.Loop() {
		b.StopTimer()
		spool, now := &spool{dir: b.TempDir()}, time.Now().Unix()
		var metrics [size]metric
		for i := range sweeps {
			at := now - int64(sweeps-i)*60
			for m := range metrics {
				metrics[m] = metric{
					"",
					fmt.Sprintf("bench.project%d.service%d.memory.m%d", m/400, m/40, m%40),
					whole(uint64(i*m) * 1234567),
					at,
				}
			}
			name := fmt.Sprintf("%s-%010d-%d.json.gz", time.Unix(at, 0).UTC().Format(spoolTime), i, size)
			harness.Must(b, os.WriteFile(filepath.Join(spool.dir, name), pack(encode(metrics[:])), 0o600))
		}
		b.StartTimer()
		q, _ := newRig(b, destination{"Backstop", target.post}, 256<<20, spool.dir)
		q.close()
		harness.Must(b, q.deliver(b.Context()))
	}
	b.ReportMetric(float64(b.N)*sweeps*size/b.Elapsed().Seconds(), "metrics/s")
}

// The highest number is no end: the next file has a name that the next start knows.
func TestSpoolCountsOn(t *testing.T) {
	dir := t.TempDir()
	harness.Must(t, os.Chmod(dir, 0o700))
	body := pack(encode([]metric{{"", "web.a", whole(1), 1795409680}}))
	const highest = "20261123T045440Z-999999999999999999-1.json.gz"
	harness.Must(t, os.WriteFile(filepath.Join(dir, highest), body, 0o600))
	log := &harness.Log{}
	for start := range 3 {
		s := &spool{dir: dir, log: log.Logger()}
		batches, err := s.open(nil)
		if err != nil || len(batches) != start+1 {
			t.Fatalf("start %d finds %d batches, %v", start, len(batches), err)
		}
		f, err := s.write(body, 1795409680, 1)
		harness.Must(t, err)
		if !spoolName.MatchString(f.name) {
			t.Errorf("a file called %s", f.name)
		}
		s.close()
	}
	if got := log.Take(); got != "" {
		t.Errorf("logged: %s", got)
	}
}

// Another program's file is not overwritten because it is called lock.
func TestSpoolLeavesAForeignLockAlone(t *testing.T) {
	for content, isOurs := range map[string]bool{
		"": true, "4711\n": true, "\x00\x00\x00": true,
		"precious\n": false, "{}": false, strings.Repeat("4711\n", 1000): false,
	} {
		dir := t.TempDir()
		harness.Must(t, os.Chmod(dir, 0o700))
		path := filepath.Join(dir, lockName)
		harness.Must(t, os.WriteFile(path, []byte(content), 0o600))
		s := &spool{dir: dir, log: (&harness.Log{}).Logger()}
		_, err := s.open(nil)
		s.close()
		if (err == nil) != isOurs || err != nil && !isForGood(err) {
			t.Errorf("with %.20q there: %v", content, err)
		}
		if got := harness.ReadFile(t, path); !isOurs && got != content {
			t.Errorf("%.20q has become %.20q", content, got)
		}
		if _, err := parseSpool(dir); (err == nil) != isOurs {
			t.Errorf("with %.20q there, --spool: %v", content, err)
		}
	}
}
