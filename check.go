package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// check writes a table of what the rules make of each running container. No name has a blank in
// it: only the remark at the end of a line may have some. ok is false if containers collide or
// one cannot be named; the error is that of the engine, or of w.
func (c *collector) check(ctx context.Context, w io.Writer) (ok bool, err error) {
	c.log = slog.New(slog.DiscardHandler) // the table says it all
	c.containers.log = c.log
	list, _, err := c.list(ctx)
	if err != nil {
		return false, err
	}
	unnamed := c.containers.findImages(ctx, c.engine, list)
	now := c.containers.remember(list, unnamed, c.hostName(), time.Now())
	var lines strings.Builder
	table := tabwriter.NewWriter(&lines, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "CONTAINER\tRULE\tCATEGORY\tMETRICS")
	byName := slices.SortedFunc(maps.Values(c.containers.byID), func(a, b *container) int {
		return cmp.Compare(a.name, b.name)
	})
	for _, known := range byName {
		rule, metrics, remark := "none", known.path+".*", ""
		if known.rule > 0 {
			rule = strconv.Itoa(known.rule)
		}
		switch {
		case unnamed[known.id] != nil:
			metrics, remark = "?", "cannot be named: "+errorText(unnamed[known.id])
		case known.drop:
			metrics, remark = "-", "dropped"
		case known.shadowed != "":
			remark = "left out: " + known.shadowed + " has this name already"
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\n",
			known.name, rule, cmp.Or(known.category, "-"), metrics, remark)
	}
	table.Flush() // a Builder takes everything
	for line := range strings.Lines(lines.String()) {
		if _, err := fmt.Fprintln(w, strings.TrimRight(line, " \n")); err != nil {
			return false, err
		}
	}
	return now.collisions == 0 && len(unnamed) == 0, nil
}
