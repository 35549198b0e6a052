package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
)

// smallDisk mounts a disk of so many bytes in memory, and returns its folder.
func smallDisk(t *testing.T, size string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "spool")
	harness.Must(t, os.Mkdir(dir, 0o700))
	if err := syscall.Mount("spool", dir, "tmpfs", 0, "mode=0700,size="+size); err != nil {
		harness.Cannot(t, "a disk of the test's own needs root: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// remount makes a disk read-only, or not.
func remount(t *testing.T, dir string, flags uintptr) {
	t.Helper()
	harness.Must(t, syscall.Mount("spool", dir, "tmpfs", syscall.MS_REMOUNT|flags, ""))
}

// makeUnreadable makes reading a file fail.
func makeUnreadable(t *testing.T, path string) {
	t.Helper()
	if os.Geteuid() != 0 {
		harness.Must(t, os.Chmod(path, 0))
		return
	}
	// Nothing is forbidden to root. But nobody has memory at address 0.
	harness.Must(t, syscall.Mount("/proc/self/mem", path, "", syscall.MS_BIND, ""))
	t.Cleanup(func() {
		if err := syscall.Unmount(path, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

const diskTold, diskBack = `level=ERROR msg="the spool cannot be used; metrics are kept in memory until it can"`, `level=INFO msg="the spool can be used again"`

func TestSpoolSurvivesAFullDisk(t *testing.T) {
	dir := smallDisk(t, "64k")
	down := true
	r := &receiver{fail: func(int, []int) error {
		if down {
			return errors.New("connection refused")
		}
		return nil
	}}
	q, log := r.spooled(t, dir)
	q.put(points(0, 100))
	q.try(t)
	log.Take()
	for i := 1; i < 40; i++ {
		q.put(points(i*100, 100))
	}
	onDisk := len(files(t, dir))
	if onDisk < 5 || onDisk > 15 {
		t.Errorf("%d files", onDisk)
	}
	if got := log.Take(); strings.Count(got, "\n") != 1 || !strings.HasPrefix(got, diskTold) ||
		!strings.Contains(got, "no space left on device") {
		t.Errorf("logged %s", got)
	}
	// What is delivered makes room for what is in memory.
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
	if got := log.Take(); got != "" {
		t.Errorf("logged %s", got)
	}
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
	remount(t, dir, syscall.MS_RDONLY)
	for i := range 3 {
		q.put(points(3+i, 1))
	}
	if got := log.Take(); strings.Count(got, "\n") != 1 || !strings.HasPrefix(got, diskTold) ||
		!strings.Contains(got, "read-only file system") {
		t.Errorf("logged %s", got)
	}
	if n := len(q.spool.litter); n > 0 {
		t.Errorf("%d files are to be removed that were never there", n)
	}
	q.try(t) // and its file cannot be removed
	q.try(t)
	if n := len(files(t, dir)); n != 3 {
		t.Errorf("%d files", n)
	}
	remount(t, dir, 0)
	q.put(points(6, 1))
	if n := len(files(t, dir)); n != 5 { // of 7, 2 were delivered
		t.Errorf("%d files", n)
	}
	if got := log.Take(); strings.Count(got, "\n") != 1 || !strings.HasPrefix(got, diskBack) {
		t.Errorf("logged %s", got)
	}
	deliverAll(t, q)
	r.inOrder(t, 0, 7)
	if left := files(t, dir); len(left) != 0 {
		t.Errorf("left %q", left)
	}
}

// It is not said to work again as long as nobody knows.
func TestSpoolIsNotPraisedUntried(t *testing.T) {
	dir := smallDisk(t, "1m")
	q, log := (&receiver{}).spooled(t, dir)
	remount(t, dir, syscall.MS_RDONLY)
	q.put(points(0, 1))
	deliverAll(t, q)
	if got := log.Take(); strings.Count(got, "\n") != 1 || !strings.HasPrefix(got, diskTold) {
		t.Errorf("logged %s", got)
	}
}

// Whoever owns the folder could lead us to write elsewhere.
func TestSpoolIsItsUsersOwn(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chown(dir, os.Geteuid()+1, -1); err != nil {
		harness.Cannot(t, "a folder of another user's needs root: %v", err)
	}
	q, _ := (&receiver{}).queue(t)
	if err := useSpool(q, &spool{dir: dir, log: q.queue.log}); err == nil ||
		!strings.Contains(err.Error(), "this folder belongs to another user") {
		t.Errorf("error %v", err)
	}
}

// What can never be a spool is refused at once.
func TestSpoolRefusesWhatIsNotForIt(t *testing.T) {
	in := t.TempDir()
	victim := filepath.Join(in, "victim")
	harness.Must(t, os.WriteFile(victim, []byte("precious"), 0o600))
	for name, create := range map[string]func(dir string) error{
		"a dangling symlink": func(dir string) error { return os.Symlink("nowhere", dir) },
		"a loop":             func(dir string) error { return os.Symlink(filepath.Base(dir), dir) },
		"a lock that is a pipe": func(dir string) error {
			return errors.Join(os.Mkdir(dir, 0o700), syscall.Mkfifo(filepath.Join(dir, lockName), 0o600))
		},
		"a lock that is a symlink": func(dir string) error {
			return errors.Join(os.Mkdir(dir, 0o700), os.Symlink(victim, filepath.Join(dir, lockName)))
		},
		"a folder anybody may write to": func(dir string) error { return errors.Join(os.Mkdir(dir, 0o700), os.Chmod(dir, 0o777)) },
		strings.Repeat("long", 100):     func(string) error { return nil },
	} {
		dir := filepath.Join(in, name)
		harness.Must(t, create(dir))
		q, _ := (&receiver{}).queue(t)
		if err := useSpool(q, &spool{dir: dir, log: q.queue.log}); err == nil {
			t.Errorf("%.80s: no error", name)
			q.spool.close()
		}
	}
	if got, err := os.ReadFile(victim); err != nil || string(got) != "precious" {
		t.Errorf("the victim holds %q, %v", got, err)
	}
}

// What cannot be removed from it does not cost what is still to be delivered.
func TestSpoolSurvivesAFullReadOnlyDisk(t *testing.T) {
	dir := smallDisk(t, "4m")
	r := &receiver{}
	q, _ := r.spooled(t, dir)
	for i := range 256 {
		q.put(points(i, 1))
	}
	remount(t, dir, syscall.MS_RDONLY)
	for i := range 10 {
		q.put(points(256+i, 1))
	}
	if q.waiting() != 256 {
		t.Errorf("%d metrics are left", q.waiting())
	}
	remount(t, dir, 0)
	q.put(points(266, 1))
	if used := usedBy(t, dir); used != q.limit {
		t.Errorf("%d bytes of files", used)
	}
	deliverAll(t, q)
	r.inOrder(t, 11, 267)
}

// A disk that does not work at the start may do so later.
func TestSpoolStartsOnAReadOnlyDisk(t *testing.T) {
	dir := smallDisk(t, "1m")
	q, _ := (&receiver{}).spooled(t, dir)
	q.put(points(0, 1))
	q.spool.close()
	harness.Must(t, os.Remove(filepath.Join(dir, lockName)))
	remount(t, dir, syscall.MS_RDONLY)
	r := &receiver{}
	q, log := r.spooled(t, dir)
	q.put(points(1, 1))
	if got := log.Take(); strings.Count(got, "\n") != 1 || !strings.HasPrefix(got, diskTold) ||
		!strings.Contains(got, "read-only file system") {
		t.Errorf("logged %s", got)
	}
	remount(t, dir, 0)
	q.put(points(2, 1))
	if n := len(files(t, dir)); n != 3 {
		t.Errorf("%d files", n)
	}
	if got := log.Take(); strings.Count(got, "\n") != 2 ||
		!strings.Contains(got, "metrics of an earlier run wait in the spool") ||
		!strings.Contains(got, diskBack) {
		t.Errorf("logged %s", got)
	}
	deliverAll(t, q)
	if len(r.got) != 3 {
		t.Errorf("%v arrived", r.got)
	}
}

// Files that cannot be read, as on a bad block, hold up nothing, and are set aside in the end.
func TestSpoolSurvivesUnreadableFiles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := newDir(t)
		r := &receiver{fail: func(int, []int) error { return errors.New("connection refused") }}
		q, log := r.spooled(t, dir)
		const unreadable = 50
		for i := range unreadable {
			q.put(points(i, 1))
		}
		q.try(t)
		log.Take()
		for _, name := range files(t, dir) {
			makeUnreadable(t, filepath.Join(dir, name))
		}
		r.fail = nil
		done := make(chan error)
		go func() { done <- q.deliver(t.Context()) }()
		begin := time.Now()
		for i := range 5 {
			q.put(points(unreadable+i, 1))
			synctest.Wait()
			if _, got := r.sofar(); len(got) != i+1 {
				t.Errorf("%d of %d arrived at once", len(got), i+1)
			}
			time.Sleep(time.Minute)
		}
		if got := log.Take(); strings.Count(got, "it is set aside") != unreadable {
			t.Errorf("logged after %s\n%s", time.Since(begin), got)
		}
		q.close()
		if err := <-done; err == nil ||
			err.Error() != fmt.Sprintf("%d metrics not delivered", unreadable) {
			t.Error(err)
		}
	})
}

// The last try is not wasted on one.
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

// While the disk with the folder is away, nothing is put in its place, and nothing of what is on it
// counts as lost.
func TestSpoolSurvivesTheLossOfItsDisk(t *testing.T) {
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
	away := dir + " away"
	harness.Must(t, os.Rename(dir, away))
	q.put(points(3, 1))
	if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it has a stand-in: %v", err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil { // as a place to mount at
		t.Fatal(err)
	}
	q.put(points(4, 1))
	if found, err := os.ReadDir(dir); err != nil || len(found) > 0 {
		t.Errorf("%v is in a stand-in, %v", found, err)
	}
	down = false
	for range 2 { // what can be read
		q.try(t)
	}
	if b, _ := q.turn(false); b != nil || figuresOf(q) != "sent 2, retried 0, dropped 0" {
		t.Errorf("%s while it is away", figuresOf(q))
	}
	harness.Must(t, errors.Join(os.Remove(dir), os.Rename(away, dir)))
	q.put(points(5, 1))
	if got := log.Take(); strings.Count(got, "\n") != 2 || !strings.HasPrefix(got, diskTold) ||
		!strings.Contains(got, diskBack) {
		t.Errorf("logged %s", got)
	}
	deliverAll(t, q)
	if slices.Sort(r.got); !slices.Equal(r.got, []int{0, 1, 2, 3, 4, 5}) {
		t.Errorf("arrived %v", r.got)
	}
	if left := files(t, dir); len(left) != 0 {
		t.Errorf("left %q", left)
	}
}

// What is given up while the folder is away does not come back with it, and nothing is removed that
// may be another daemon's.
func TestSpoolGivesUpInAbsence(t *testing.T) {
	dir := newDir(t)
	q, log := (&receiver{}).spooled(t, dir)
	for i := range 256 {
		q.put(points(i, 1))
	}
	away := dir + " away"
	harness.Must(t, os.Rename(dir, away))
	for i := range 100 {
		q.put(points(256+i, 1))
	}
	if got := len(files(t, away)); got != 256 {
		t.Errorf("%d files, where none may be removed", got)
	}
	harness.Must(t, os.Rename(away, dir))
	q.put(points(356, 1))
	if used := usedBy(t, dir); used > q.limit {
		t.Errorf("%d bytes of files", used)
	}
	if got, want := figuresOf(q), fmt.Sprintf("dropped %d", 357-q.waiting()); !strings.HasSuffix(
		got,
		want,
	) {
		t.Errorf("its own figures are %s with %d left, want %s", got, q.waiting(), want)
	}
	if got := log.Take(); strings.Contains(got, "earlier run") {
		t.Errorf("logged %s", got)
	}
	r := &receiver{}
	q.to = r.destination()
	deliverAll(t, q)
	r.inOrder(t, 357-len(r.got), 357)
	if len(r.got) < 200 {
		t.Errorf("%d arrived", len(r.got))
	}
}
