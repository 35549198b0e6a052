// Command gododir runs the project's tasks. From the project's top folder:
//
//	go run -C gododir . --help     lists them
//	go run -C gododir . test       runs one
//	go run -C gododir . test -w    … and again whenever a file it depends on changes
//
// It is a module of its own, so that the product does not depend on what it is built with.
package main

import (
	"fmt"
	"time"

	"github.com/mgutz/minimist"
	do "gopkg.in/godo.v2"
	"gopkg.in/godo.v2/watcher"
)

func main() { do.Godo(tasks) }

func tasks(p *do.Project) {
	// With -C this folder is the working directory: commands run in, and patterns start
	// from, the one above.
	top := do.M{"$in": ".."}
	watching := minimist.Parse().AsBool("watch", "w") // as godo itself finds out

	p.Task("default", do.S{"test"}, nil).Desc("The same as test")

	var tested int64 // when the last test began
	p.Task("test", nil, func(c *do.Context) {
		// Files that change together come one by one, and the first run was of them all.
		if e := c.FileEvent; e != nil && e.Event == watcher.MODIFIED && e.UnixNano < tested {
			return
		}
		tested = time.Now().UnixNano()
		c.Run("go vet ./...", top)
		c.Run("go test -race ./...", top)
		if c.Error != nil && watching {
			// Were this the first run, godo would end, just when there is something to repair.
			fmt.Println("FAIL:", c.Error)
			c.Error = nil
		}
	}).Src("../*.{go,mod,sum}", "../testdata/**", "../deploy/**", "../script/**").
		Desc("Vets and tests; watches what tests read, too")

	p.Task("build", nil, func(c *do.Context) {
		c.Run("CGO_ENABLED=0 go build -trimpath -o docker-stats-to-backstop .", top)
	}).Src("../*.{go,mod,sum}", "!../*_test.go").Desc("Builds docker-stats-to-backstop")

	p.Task("run", do.S{"build"}, func(c *do.Context) {
		// Not c.Start: after a change that would build once more, without our options.
		c.Error = do.Start("./docker-stats-to-backstop --poll=5s", top)
	}).Desc("Builds it and runs it, with --poll=5s and what SRV_… variables say")

	p.Task("release", nil, func(c *do.Context) {
		c.Run("script/release", top)
	}).Desc("Builds a release for all platforms into dist, with packages and checksums")
}
