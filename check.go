package main

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
)

// check returns what the rules make of each running container: one line each, in columns that
// scripts can split at blanks, with a remark at the end. ok is false if containers collide or one
// cannot be named. The error is the engine's.
func check(ctx context.Context, c *collector) (text string, ok bool, err error) {
	found, err := c.survey(ctx)
	if err != nil {
		return "", false, err
	}
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
		case known.path == "":
			metrics, remark = "?", "cannot be named: "+errorText(known.err)
		case known.drop:
			metrics, remark = "-", "dropped"
		case known.err != nil:
			remark = "left out: " + errorText(known.err)
		case c.containers.rules.needHost() && !c.containers.rules.hasHost(known.rule):
			remark = "no ${host} in it: collides with a container of that name on another host"
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\n", fit(known.name, maxForeign), rule,
			cmp.Or(known.category, "-"), metrics, fit(remark, maxShown))
	}
	table.Flush() // writing to a Builder cannot fail
	var trimmed strings.Builder
	for line := range strings.Lines(lines.String()) {
		trimmed.WriteString(strings.TrimRight(line, " \n") + "\n")
	}
	return trimmed.String(), len(found.left) == 0, nil
}
