package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
)

const (
	diskTold = `level=ERROR msg="cannot use the spool, keeping metrics in memory" `
	diskBack = `level=INFO msg="the spool works again"`
)

// usedBy returns how much of the disk the files in a folder take.
func usedBy(t *testing.T, dir string) (bytes int64) {
	t.Helper()
	for _, name := range files(t, dir) {
		if info, err := os.Lstat(filepath.Join(dir, name)); err == nil {
			bytes += roomOf(info.Size())
		}
	}
	return bytes
}

// mount mounts something, which goes with the test.
func mount(t *testing.T, dir string, args ...string) {
	t.Helper()
	mustRun(t, "mount", append(args, dir)...)
	t.Cleanup(func() {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
}

// mustRun runs a command that the test needs.
func mustRun(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		harness.Cannot(t, "%s %q: %v: %s", name, args, err, out)
	}
}

// smallDisk mounts a disk of that size in memory, and returns its folder.
func smallDisk(t *testing.T, size string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "spool")
	harness.Must(t, os.Mkdir(dir, 0o700))
	mount(t, dir, "-t", "tmpfs", "-o", "mode=0700,size="+size, "spool")
	return dir
}

// remount makes a disk read-only, "ro", or writable, "rw".
func remount(t *testing.T, dir, mode string) {
	t.Helper()
	mustRun(t, "mount", "-o", "remount,"+mode, dir)
}

// makeUnreadable makes reading a file fail.
func makeUnreadable(t *testing.T, path string) {
	t.Helper()
	if os.Geteuid() != 0 {
		harness.Must(t, os.Chmod(path, 0))
		return
	}
	// Root may read every file. But no process has memory at address 0.
	mount(t, path, "--bind", fmt.Sprintf("/proc/%d/mem", os.Getpid()))
}

// Metrics are in files once put returns. The next run delivers them, oldest first.
func TestSpoolOutlivesItsProcess(t *testing.T) {
	dir := newDir(t)
	q, _ := (&receiver{}).spooled(t, dir)
	q.put(points(0, 5001))
	q.put(points(5001, 2))
	names := files(t, dir)
	want := []string{
		"20261123T045440Z-0000000001-5000.json.gz",
		"20261123T061800Z-0000000002-1.json.gz",
		"20261123T061801Z-0000000003-2.json.gz",
	}
	if !slices.Equal(names, want) {
		t.Errorf("files %q, want %q", names, want)
	}
	packed, err := os.ReadFile(filepath.Join(dir, names[2]))
	harness.Must(t, err)
	if body, err := unpack(packed); err != nil || !bytes.Equal(body, encode(points(5001, 2))) {
		t.Errorf("%s holds %s %v", names[2], body, err)
	}
	if runtime.GOOS != "windows" {
		for _, name := range []string{".", names[0], lockName} {
			path := filepath.Join(dir, name)
			if info, err := os.Stat(path); err != nil || info.Mode().Perm()&0o077 != 0 {
				t.Errorf("%s is not private: %v %v", path, info.Mode(), err)
			}
		}
	}
	q.kill() // as a kill does

	r := &receiver{}
	q, log := r.spooled(t, dir)
	logged(t, log, 1, `level=INFO msg="metrics of an earlier run wait in the spool" `+
		`metrics=5003 batches=3 since=2026-11-23T04:54:40Z`+"\n")
	own := asLines(q.own("h", time.Unix(1, 0)))
	if !regexp.MustCompile(`h\.metrics\.spooled \d{5} 1`).MatchString(own) {
		t.Errorf("its own figures are\n%s", own)
	}
	deliverAll(t, q)
	r.inOrder(t, 0, 5003)
	if left := files(t, dir); len(left) != 0 {
		t.Errorf("left %q", left)
	}
	logged(t, log, 1, `level=INFO msg="metrics of the earlier run are delivered" `+
		`metrics=5003 lasted=`)
	// The next run does not use names again.
	q, _ = r.spooled(t, dir)
	q.put(points(0, 1))
	q.kill()
	q, _ = r.spooled(t, dir)
	q.put(points(0, 1))
	if n := len(files(t, dir)); n != 2 {
		t.Errorf("%d files of two batches", n)
	}
}

// The files stay within the limit: those set aside go first, then the oldest.
func TestSpoolIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := newDir(t)
		q, _ := (&receiver{}).spooled(t, dir)
		q.put(points(0, 1))
		q.kill()
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
		if !strings.Contains(log.Take(), "no room for more metrics") {
			t.Error("nothing is logged")
		}
		// A smaller limit is respected from the start.
		q.kill()
		q, log = (&receiver{}).queue(t)
		q.limit = 1 << 19
		harness.Must(t, q.useSpool(&spool{dir: dir, log: log.Logger()}))
		q.settle()
		if used := usedBy(t, dir); used != q.limit {
			t.Errorf("%d bytes of files", used)
		}
		q.to = r.destination()
		deliverRest(t, q)
		r.inOrder(t, 329-128, 329)
	})
}

// A daemon whose folder was removed keeps metrics in memory, and leaves alone what another one has
// in its place.
func TestSpoolSurvivesARemovedFolder(t *testing.T) {
	dir := newDir(t)
	one := &receiver{}
	first, log := one.spooled(t, dir)
	first.put(points(0, 1)) // its turn comes at once, so it is in memory, too
	harness.Must(t, os.RemoveAll(dir))
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
	logged(t, log, 1, diskTold+`error="`)
	deliverAll(t, second)
	deliverAll(t, first)
	one.inOrder(t, 0, 4)
	if !slices.Equal(other.got, []int{100}) {
		t.Errorf("arrived %v", other.got)
	}
}

// The owner of the folder could make the daemon write elsewhere, so it has to be its own user.
func TestSpoolIsItsUsersOwn(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chown(dir, os.Geteuid()+1, -1); err != nil {
		harness.Cannot(t, "only root gives a folder to another user: %v", err)
	}
	q, _ := (&receiver{}).queue(t)
	err := q.useSpool(&spool{dir: dir, log: q.queue.log})
	if err == nil || !strings.Contains(err.Error(), "this folder belongs to another user") {
		t.Errorf("error %v", err)
	}
}

// A path that can never be a spool is refused at once.
func TestSpoolRefusesWhatIsNotForIt(t *testing.T) {
	in := t.TempDir()
	link := func(target, path string) {
		if err := os.Symlink(target, path); err != nil {
			harness.Cannot(t, "no symlinks: %v", err)
		}
	}
	for name, create := range map[string]func(dir string){
		"a dangling symlink":        func(dir string) { link("nowhere", dir) },
		"a loop":                    func(dir string) { link(filepath.Base(dir), dir) },
		strings.Repeat("long", 100): func(string) {},
	} {
		dir := filepath.Join(in, name)
		create(dir)
		q, _ := (&receiver{}).queue(t)
		if err := q.useSpool(&spool{dir: dir, log: q.queue.log}); err == nil {
			t.Errorf("%.80s: no error", name)
			q.kill()
		}
	}
}

// Another process may make the same folder, or one above it, at the same time.
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

// A truncated file of any length loses its own metrics only, and is logged once.
func TestSpoolSurvivesTruncation(t *testing.T) {
	made := newDir(t)
	q, _ := (&receiver{}).spooled(t, made)
	for i := range 3 {
		q.put(points(i*3, 3))
	}
	q.kill()
	names := files(t, made)
	bodies := make([][]byte, 3)
	for i, name := range names {
		bodies[i] = []byte(harness.ReadFile(t, filepath.Join(made, name)))
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
		want := `level=ERROR msg="cannot use a spooled file, setting it aside" file=` + names[1] +
			`.bad metrics=3 error="not a whole gzip file: `
		got := log.Take()
		if strings.Count(got, "level=ERROR") != 1 || !strings.Contains(got, want) {
			t.Errorf("%d bytes: logged %s", length, got)
		}
		if figures := figuresOf(q); figures != "sent 6, retried 0, dropped 3" {
			t.Errorf("%d bytes: its own figures are %s", length, figures)
		}
		if left := files(t, dir); !slices.Equal(left, []string{names[1] + badSuffix}) {
			t.Errorf("%d bytes: left %q", length, left)
		}
	}
}

// Bad files and foreign files stop neither the start nor the delivery of the good ones.
func TestSpoolSurvivesOthersFiles(t *testing.T) {
	dir := newDir(t)
	q, _ := (&receiver{}).spooled(t, dir)
	q.put(points(0, 2))
	q.put(points(2, 2))
	q.kill()
	forged := func(name, body string) {
		harness.Must(t, os.WriteFile(filepath.Join(dir, name), pack([]byte(body)), 0o600))
	}
	point := func(name, value string) string {
		return `[{"metric":"` + name + `","value":` + value + `,"measure_time":1795409680}]`
	}
	bad := map[string]string{
		"20261123T045441Z-0000000011-1.json.gz": point(`web.a\nforged.name`, "1"),
		"20261123T045441Z-0000000012-1.json.gz": `[1]`,
		"20261123T045441Z-0000000013-1.json.gz": point("web.a", "null"),
		"20261123T045441Z-0000000014-1.json.gz": `{}`,
		"20261123T045441Z-0000000015-1.json.gz": point("web.a", "1") + " and more",
		"20261123T045441Z-0000000016-1.json.gz": strings.Repeat(" ", maxBody+1),
		"20261399T999999Z-0000000017-1.json.gz": `[]`, // no time
	}
	for name, body := range bad {
		forged(name, body)
	}
	folder := "20261123T045441Z-0000000018-9.json.gz"
	harness.Must(t, os.MkdirAll(filepath.Join(dir, folder, "x"), 0o700))
	bad[folder] = ""
	// The unfinished file of a killed daemon is removed. Files of others stay, and those that were
	// set aside before.
	forged(".20261123T045441Z-0000000019-1.json.gz", "")
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
			t.Errorf("%s is not logged once:\n%s", name, lines)
		}
		others = append(others, name+badSuffix)
	}
	slices.Sort(others)
	if left := files(t, dir); !slices.Equal(left, others) {
		t.Errorf("left\n%q, want\n%q", left, others)
	}
	want := `level=WARN msg="foreign files in the spool folder, ignoring them" ` +
		`files=2 example=lost+found`
	if !strings.Contains(lines, want) {
		t.Errorf("logged\n%s", lines)
	}
}

// Somebody may remove files while the daemon runs. What was in them counts as lost.
func TestSpoolSurvivesRemovedFiles(t *testing.T) {
	dir := newDir(t)
	r := &receiver{fail: func(try int, _ []int) error {
		if try == 1 {
			return errors.New("connection refused")
		}
		return nil
	}}
	q, log := r.spooled(t, dir)
	q.pauses = pauses{first: time.Millisecond, longest: time.Millisecond}
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
	if !slices.Equal(r.got, []int{3, 0}) { // the newest was tried first
		t.Errorf("arrived %v", r.got)
	}
	gone := `level=ERROR msg="a spooled file is gone, and its metrics with it" `
	if got := log.Take(); strings.Count(got, gone) != 2 {
		t.Errorf("logged\n%s", got)
	}
}

// Unreadable files, as on a bad block, do not hold up deliveries. They are set aside.
func TestSpoolSurvivesUnreadableFiles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := newDir(t)
		r := &receiver{fail: func(int, []int) error { return errors.New("connection refused") }}
		q, _ := r.spooled(t, dir)
		const unreadable = 50
		for i := range unreadable {
			q.put(points(i, 1))
		}
		q.kill()
		r.fail = nil
		q, log := r.spooled(t, dir)
		log.Take()
		for _, name := range files(t, dir)[1:] { // the first is read ahead
			makeUnreadable(t, filepath.Join(dir, name))
		}
		done := make(chan error)
		go func() { done <- q.deliver(t.Context()) }()
		begin := time.Now()
		for i := range 5 {
			q.put(points(unreadable+i, 1))
			time.Sleep(time.Second)
			if _, got := r.sofar(); !slices.Contains(got, unreadable+i) {
				t.Errorf("%d of %d arrived at once", len(got), i+1)
			}
			time.Sleep(time.Minute)
		}
		if got := log.Take(); strings.Count(got, "setting it aside") != unreadable-1 {
			t.Errorf("logged after %s\n%s", time.Since(begin), got)
		}
		q.close()
		want := fmt.Sprintf("%d metrics not delivered", unreadable-1)
		if err := <-done; err == nil || err.Error() != want {
			t.Error(err)
		}
	})
}

// The last try before the end is not wasted on an unreadable file.
func TestSpoolEndsWithAnUnreadableFile(t *testing.T) {
	dir := newDir(t)
	r := &receiver{fail: func(int, []int) error { return errors.New("connection refused") }}
	q, _ := r.spooled(t, dir)
	q.put(points(0, 1))
	q.put(points(1, 1))
	q.try(t)
	name := files(t, dir)[0]
	makeUnreadable(t, filepath.Join(dir, name))
	r.fail = nil
	q.close()
	if err := q.deliver(t.Context()); err == nil || err.Error() != "1 metrics not delivered" {
		t.Error(err)
	}
	if !slices.Equal(r.got, []int{1}) {
		t.Errorf("arrived %v", r.got)
	}
}

func TestSpoolSurvivesAFullDisk(t *testing.T) {
	dir := smallDisk(t, "64k")
	down := true
	r := &receiver{fail: unreachableWhile(&down)}
	q, log := r.spooled(t, dir)
	q.put(points(0, 100))
	q.try(t)
	log.Take()
	for i := 1; i < 40; i++ {
		q.put(points(i*100, 100))
	}
	onDisk := len(files(t, dir))
	if onDisk < 5 || onDisk > 16 {
		t.Errorf("%d files", onDisk)
	}
	logged(t, log, 1, diskTold, "no space left on device")
	// Deliveries make room for what is in memory.
	down = false
	for range 3 {
		q.try(t)
	}
	q.put(points(4000, 100))
	for _, name := range files(t, dir) {
		if strings.HasPrefix(name, ".") {
			t.Errorf("%s is left", name)
		}
	}
	if n := len(files(t, dir)); n < onDisk-1 {
		t.Errorf("only %d files; there were %d", n, onDisk)
	}
	logged(t, log, 0)
	for q.waiting() > 300 {
		q.try(t)
	}
	q.put(points(4100, 100))
	if got := log.Take(); !strings.Contains(got, diskBack) {
		t.Errorf("logged %s", got)
	}
	deliverAll(t, q)
	if len(r.got) != 4200 {
		t.Errorf("%d arrived", len(r.got))
	}
	if left := files(t, dir); len(left) != 0 {
		t.Errorf("left %q", left)
	}
}

func TestSpoolSurvivesAReadOnlyDisk(t *testing.T) {
	dir := smallDisk(t, "1m")
	r := &receiver{}
	q, log := r.spooled(t, dir)
	for i := range 3 {
		q.put(points(i, 1))
	}
	remount(t, dir, "ro")
	for i := range 3 {
		q.put(points(3+i, 1))
	}
	logged(t, log, 1, diskTold, "read-only file system")
	q.try(t) // its file cannot be removed
	q.try(t)
	if n := len(files(t, dir)); n != 3 {
		t.Errorf("%d files", n)
	}
	remount(t, dir, "rw")
	q.put(points(6, 1))
	if n := len(files(t, dir)); n != 7 { // 2 were delivered; the next start sends them again
		t.Errorf("%d files", n)
	}
	logged(t, log, 1, diskBack)
	deliverAll(t, q)
	r.inOrder(t, 0, 7)
	if left := files(t, dir); len(left) != 2 {
		t.Errorf("left %q", left)
	}
}

// Files that cannot be removed do not cost metrics that wait.
func TestSpoolSurvivesAFullReadOnlyDisk(t *testing.T) {
	dir := smallDisk(t, "4m")
	r := &receiver{}
	q, _ := r.spooled(t, dir)
	for i := range 256 {
		q.put(points(i, 1))
	}
	remount(t, dir, "ro")
	for i := range 10 {
		q.put(points(256+i, 1))
	}
	if n := q.waiting(); n < 256 {
		t.Errorf("%d metrics are left", n)
	}
	remount(t, dir, "rw")
	q.put(points(266, 1))
	if n := q.waiting(); n != 256 {
		t.Errorf("%d metrics are left", n)
	}
	deliverRest(t, q)
	r.inOrder(t, 11, 267)
}

// A disk that does not work at the start may work later.
func TestSpoolStartsOnAReadOnlyDisk(t *testing.T) {
	dir := smallDisk(t, "1m")
	q, _ := (&receiver{}).spooled(t, dir)
	q.put(points(0, 1))
	q.kill()
	harness.Must(t, os.Remove(filepath.Join(dir, lockName)))
	remount(t, dir, "ro")
	r := &receiver{}
	q, log := r.spooled(t, dir)
	q.put(points(1, 1))
	logged(t, log, 1, diskTold, "read-only file system")
	remount(t, dir, "rw")
	q.put(points(2, 1))
	if n := len(files(t, dir)); n != 3 {
		t.Errorf("%d files", n)
	}
	logged(t, log, 2, "metrics of an earlier run wait in the spool", diskBack)
	deliverAll(t, q)
	if len(r.got) != 3 {
		t.Errorf("%v arrived", r.got)
	}
}

// The log does not call the spool usable again before it was tried.
func TestSpoolIsNotCalledUsableUntried(t *testing.T) {
	dir := smallDisk(t, "1m")
	q, log := (&receiver{}).spooled(t, dir)
	remount(t, dir, "ro")
	q.put(points(0, 1))
	deliverAll(t, q)
	logged(t, log, 1, diskTold)
}

// The folder is used wherever it is: nothing is put into another one in its place.
func TestSpoolFollowsItsFolder(t *testing.T) {
	dir := newDir(t)
	down := true
	r := &receiver{fail: unreachableWhile(&down)}
	q, log := r.spooled(t, dir)
	q.put(points(0, 1))
	q.try(t)
	log.Take()
	away := dir + " away"
	harness.Must(t, os.Rename(dir, away))
	q.put(points(1, 1))
	harness.Must(t, os.Mkdir(dir, 0o700)) // as a place to mount at
	q.put(points(2, 1))
	if found, err := os.ReadDir(dir); err != nil || len(found) > 0 {
		t.Errorf("%v is in another folder, %v", found, err)
	}
	if n := len(files(t, away)); n != 3 {
		t.Errorf("%d files", n)
	}
	logged(t, log, 0)
	down = false
	deliverAll(t, q)
	slices.Sort(r.got)
	r.inOrder(t, 0, 3)
	if left := files(t, away); len(left) != 0 {
		t.Errorf("left %q", left)
	}
}

// A disk that comes and goes with each poll has a bounded log, whose last line is true.
func TestSpoolIsQuietAboutFlapping(t *testing.T) {
	r, dir := &receiver{}, smallDisk(t, "1m")
	q, log := r.spooled(t, dir)
	for i := range 50 {
		remount(t, dir, "ro")
		q.put(points(2*i, 1))
		remount(t, dir, "rw")
		q.put(points(2*i+1, 1))
	}
	lines := log.Take()
	if n := strings.Count(lines, "\n"); n > maxNews+1 || !strings.HasSuffix(lines, diskBack+"\n") {
		t.Errorf("%d lines logged:\n%s", n, lines)
	}
	deliverAll(t, q)
	r.inOrder(t, 0, 100)
}

// BenchmarkDrain delivers a day's backlog of 100 containers, 4,000 metrics a minute, from the spool
// to a stand-in, or to the Backstop at $BENCH_BACKSTOP, a URL as in --backstop.
func BenchmarkDrain(b *testing.B) {
	url := os.Getenv("BENCH_BACKSTOP")
	if url == "" {
		s := harness.NewStandIn(b)
		s.Set("", harness.AnswerWith(http.StatusOK, "ok"))
		url = s.URL + "/publish/docker"
	}
	drain(b, mustBackstop(b, url).destination())
}

// Another program's file is not overwritten because it is called lock.
func TestSpoolLeavesAForeignLockAlone(t *testing.T) {
	for _, content := range []string{"", "4711\n", "precious\n"} {
		dir := t.TempDir()
		harness.Must(t, os.Chmod(dir, 0o700))
		path := filepath.Join(dir, lockName)
		harness.Must(t, os.WriteFile(path, []byte(content), 0o600))
		s := &spool{dir: dir, log: (&harness.Log{}).Logger()}
		_, err := s.open()
		harness.Must(t, err)
		s.close()
		if got := harness.ReadFile(t, path); got != content {
			t.Errorf("%.20q has become %.20q", content, got)
		}
	}
}

// A file without a metric in it is set aside, whatever the receiver says.
func TestSpoolSetsEmptyFilesAside(t *testing.T) {
	dir := newDir(t)
	harness.Must(t, os.MkdirAll(dir, 0o700))
	name := filepath.Join(dir, "20261123T105436Z-0000000042-1.json.gz")
	harness.Must(t, os.WriteFile(name, pack([]byte("[]")), 0o600))
	r := &receiver{fail: func(int, []int) error { return &refusal{status: 400} }}
	q, _ := r.spooled(t, dir)
	q.close()
	if err := q.deliver(t.Context()); err == nil {
		t.Error("no error")
	}
	if _, err := os.Stat(name + badSuffix); err != nil || r.tries > 0 {
		t.Errorf("%d requests, %v", r.tries, err)
	}
}

// The count in a file's name may be wrong: what is in the file counts.
func TestSpoolCountsWhatIsInAFile(t *testing.T) {
	dir := newDir(t)
	harness.Must(t, os.MkdirAll(dir, 0o700))
	name := filepath.Join(dir, "20261123T105436Z-0000000042-1.json.gz")
	harness.Must(t, os.WriteFile(name, pack(encode(points(0, 20))), 0o600))
	r := &receiver{fail: refusing(400, func(v int) bool { return v >= 15 })}
	q, _ := r.spooled(t, dir)
	deliverRest(t, q)
	if got := figuresOf(q); !strings.HasPrefix(got, "sent 15, ") ||
		!strings.HasSuffix(got, " dropped 5") {
		t.Errorf("its own figures are %s", got)
	}
}
