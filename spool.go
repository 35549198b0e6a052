package main

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"syscall"
	"time"

	"github.com/gofrs/flock"
)

// spool keeps batches in files, one each, in a folder of its own. Their names have time and count,
// so that a start needs to read none of them:
//
//	20261123T105436Z-0000000042-4000.json.gz
//
// is the 42nd batch, 4,000 metrics of which the oldest was measured at 10:54:36 UTC: the body of
// a request to Backstop, gzip'd. Its methods are called by one goroutine at a time.
type spool struct {
	dir string
	log *slog.Logger

	root    *os.Root     // the folder, nil until it is ours
	lock    *flock.Flock // of it
	counter uint64       // the highest in a name so far
	bad     []file       // set aside, oldest first
}

const (
	lockName  = "lock"
	badSuffix = ".bad"
	spoolTime = "20060102T150405Z"
)

// spoolName is a file's name. While writeDurably has not renamed it, there is a dot before it.
var spoolName = regexp.MustCompile(
	`^\.?(\d{8}T\d{6}Z)-(\d{10,18})-(\d{1,9})\.json\.gz(\.bad)?$`)

// spoolTrouble says what is wrong with the folder dir as a spool, "" if nothing is, or if it is not
// there yet. A user who may write to it could forge or remove metrics, or redirect what is written.
func spoolTrouble(dir string) string {
	info, err := os.Stat(dir)
	switch {
	case errors.Is(err, syscall.ENOTDIR) || err == nil && !info.IsDir():
		return "not a folder"
	case err != nil:
		return ""
	case !isOwn(info):
		return "this folder belongs to another user: choose another one, or chown it"
	case runtime.GOOS != "windows" && info.Mode().Perm()&0o022 != 0:
		return fmt.Sprintf("other users may write to this folder (mode %#o): "+
			"choose another one, or chmod go-w it", info.Mode().Perm())
	}
	return ""
}

var (
	errSpoolTaken = errors.New("another docker-stats-to-backstop uses this folder")
	errSpoolUnfit = errors.New("not fit for a spool")
)

// isPermanent reports whether retrying open is pointless after err.
func isPermanent(err error) bool {
	lasting := []error{errSpoolTaken, errSpoolUnfit, fs.ErrPermission, fs.ErrExist,
		syscall.ENOTDIR, syscall.ELOOP, syscall.ENAMETOOLONG}
	return slices.ContainsFunc(lasting, func(l error) bool { return errors.Is(err, l) })
}

// open makes the folder ours and returns the batches in it, oldest first. It is called again until
// it succeeds. From then on it is this folder that is used, also if it is moved, or if a disk is
// mounted over it or unmounted: what would be put into a stand-in would be out of sight later.
func (s *spool) open() ([]file, error) {
	if s.root != nil {
		return nil, s.check()
	}
	if err := makeFolder(s.dir); err != nil {
		return nil, err
	}
	if trouble := spoolTrouble(s.dir); trouble != "" {
		return nil, fmt.Errorf("%w: %s: %s", errSpoolUnfit, s.dir, trouble)
	}
	lock := flock.New(filepath.Join(s.dir, lockName), flock.SetPermissions(0o600))
	isOurs, err := lock.TryLock()
	if err == nil && !isOurs {
		err = errSpoolTaken
	}
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(s.dir) // sorted, and so oldest first
	if err == nil {
		s.root, err = os.OpenRoot(s.dir)
	}
	if err != nil {
		lock.Close()
		return nil, err
	}
	s.lock = lock
	return s.load(entries), nil
}

func (s *spool) load(entries []fs.DirEntry) (batches []file) {
	var foreign []string
	for _, entry := range entries {
		name := entry.Name()
		parts := spoolName.FindStringSubmatch(name)
		switch {
		case name == lockName:
			continue
		case parts == nil:
			foreign = append(foreign, name)
			continue
		case name[0] == '.':
			s.remove(name) // its batch was not queued yet when we were killed
			continue
		}
		counter, _ := strconv.ParseUint(parts[2], 10, 64)
		s.counter = max(s.counter, counter)
		metrics, _ := strconv.Atoi(parts[3])
		var size int64
		if info, err := entry.Info(); err == nil {
			size = roomOf(info.Size())
		}
		at, err := time.Parse(spoolTime, parts[1])
		f := file{name, at.Unix(), metrics, size}
		switch {
		case parts[4] != "":
			s.bad = append(s.bad, f)
		case err != nil || !entry.Type().IsRegular() || size > maxBody:
			s.setAside(f, errors.New("not from this program"))
		default:
			batches = append(batches, f)
		}
	}
	if len(foreign) > 0 {
		s.log.Warn("foreign files in the spool folder, ignoring them",
			"files", len(foreign), "example", foreign[0])
	}
	return batches
}

// makeFolder makes the folder dir and those above it, private and durable.
func makeFolder(dir string) error {
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for above := filepath.Dir(dir); above != dir; dir, above = above, filepath.Dir(above) {
		_ = syncFolder(os.Open, above) // that may not be ours to open
	}
	return nil
}

// check returns why the folder cannot be used, nil if it can.
func (s *spool) check() error {
	if s.root == nil {
		return errors.New("it could not be opened")
	}
	_, err := s.root.Lstat(lockName)
	return err
}

// close lets others have the folder.
func (s *spool) close() error {
	if s.root == nil {
		return nil
	}
	return cmp.Or(s.root.Close(), s.lock.Close())
}

// write puts a packed body into a file and into safety: after it, it outlives a loss of power. The
// suffix is badSuffix if it is only there to be looked at.
func (s *spool) write(packed []byte, oldest int64, metrics int, suffix string) (f file, err error) {
	if err := s.check(); err != nil {
		return f, err
	}
	s.counter++
	at := time.Unix(oldest, 0).UTC().Format(spoolTime)
	name := fmt.Sprintf("%s-%010d-%d.json.gz%s", at, s.counter, metrics, suffix)
	if err = writeDurably(s.root, name, packed); err != nil {
		s.remove(name) // it may be there, though not in safety
		return f, err
	}
	f = file{name, oldest, metrics, roomOf(int64(len(packed)))}
	if suffix != "" {
		s.bad = append(s.bad, f)
	}
	return f, nil
}

// writeDurably writes a file that is there wholly or not at all, whatever happens to the process or
// to the power, and for its user alone. Windows has no way to rename it that survives a loss of
// power for certain; there, what was cut off is found by its checksum.
func writeDurably(root *os.Root, name string, data []byte) error {
	unfinished := "." + name
	if runtime.GOOS == "windows" {
		unfinished = name
	}
	f, err := root.OpenFile(unfinished, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = cmp.Or(err, f.Sync(), f.Close()); err == nil && unfinished != name {
		err = root.Rename(unfinished, name)
	}
	if err != nil {
		_ = root.Remove(unfinished)
		return err
	}
	return syncFolder(root.Open, ".") // only then is the new name durable
}

// read returns the body in a file. A file that cannot be used is set aside, and the body is nil.
// The error is not about the file.
func (s *spool) read(f file) (body []byte, err error) {
	body, err = s.root.ReadFile(f.name)
	if errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) ||
		err != nil && s.check() != nil {
		return nil, err
	}
	if err == nil {
		body, err = bodyIn(body)
	}
	if err != nil {
		s.setAside(f, err)
		return nil, nil
	}
	return body, nil
}

// bodyIn returns the body in a file, checked: it may be damaged, or somebody else's.
func bodyIn(packed []byte) ([]byte, error) {
	body, err := unpack(packed)
	if err != nil {
		return nil, err
	}
	metrics, err := decode(body)
	if err == nil && len(metrics) == 0 {
		err = errors.New("no metric in it")
	}
	return encode(metrics), err
}

// remove removes a file. If that fails, the next start finds it, and sends it again.
func (s *spool) remove(name string) { _ = s.root.Remove(name) }

// setAside keeps a file that cannot be used for somebody to look at, as long as there is room.
func (s *spool) setAside(f file, why error) {
	if errors.Is(why, fs.ErrNotExist) {
		s.log.Error("a spooled file is gone, and its metrics with it",
			"file", f.name, "metrics", f.metrics)
		return
	}
	bad := f.name + badSuffix
	s.log.Error("cannot use a spooled file, setting it aside",
		"file", bad, "metrics", f.metrics, "error", errorText(why))
	if err := s.root.Rename(f.name, bad); err == nil {
		s.bad = append(s.bad, file{bad, f.oldest, f.metrics, f.size})
	}
}

// makeRoom removes files that were set aside, oldest first, until they and what else is held, in
// bytes, fit into limit or there are no more.
func (s *spool) makeRoom(held, limit int64) {
	for _, f := range s.bad {
		held += f.size
	}
	for held > limit && len(s.bad) > 0 {
		s.remove(s.bad[0].name) // fails for a folder that somebody made: what is in it is not ours
		held -= s.bad[0].size
		s.bad = s.bad[1:]
	}
}
