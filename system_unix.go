//go:build !windows

package main

import (
	"cmp"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// writeDurably writes a file that is there wholly or not at all, whatever happens to the process or
// to the power, and for its user alone.
func writeDurably(root *os.Root, name string, data []byte) error {
	unfinished := "." + name
	f, err := root.OpenFile(unfinished, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = cmp.Or(err, f.Sync(), f.Close()); err == nil {
		err = root.Rename(unfinished, name)
	}
	if err != nil {
		_ = root.Remove(unfinished)
		return err
	}
	folder, err := root.Open(".")
	if err != nil {
		return err
	}
	defer folder.Close()
	return folder.Sync() // only then is the new name durable
}

// syncPath waits until the names in a folder are on the disk.
func syncPath(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// isOwn tells whether a folder belongs to this process's user.
func isOwn(info fs.FileInfo) bool {
	stat, ok := info.Sys().(*syscall.Stat_t)
	return !ok || int(stat.Uid) == os.Geteuid()
}

// readNow reads what is there from conn. It returns os.ErrDeadlineExceeded if there is nothing yet.
// Reading with a short deadline would not do: when this process was stopped meanwhile, that returns
// without having looked.
func readNow(conn *net.TCPConn, p []byte) (n int, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	closed := raw.Read(func(fd uintptr) bool {
		for {
			if n, err = syscall.Read(int(fd), p); err != syscall.EINTR {
				return true
			}
		}
	})
	switch {
	case closed != nil:
		return 0, closed
	case errors.Is(err, syscall.EAGAIN):
		return 0, os.ErrDeadlineExceeded
	case err != nil:
		return 0, os.NewSyscallError("read", err)
	case n == 0:
		return 0, io.EOF
	}
	return n, nil
}

// unacknowledged returns how many bytes that were written to conn the other side's system has not
// taken, as far as this system can tell.
func unacknowledged(conn *net.TCPConn) (n int) {
	if raw, err := conn.SyscallConn(); err == nil && runtime.GOOS == "linux" {
		_ = raw.Control(func(fd uintptr) {
			n, _ = unix.IoctlGetInt(int(fd), unix.TIOCOUTQ) // for a socket it is called SIOCOUTQ
		})
	}
	return n
}

// socketError returns an error of conn that came after the last call.
func socketError(conn *net.TCPConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	code := 0
	closed := raw.Control(func(fd uintptr) {
		code, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
	})
	if code != 0 {
		err = os.NewSyscallError("read", syscall.Errno(code))
	}
	return cmp.Or(closed, err)
}
