package script_test

import (
	"cmp"
	"errors"
	"go/ast"
	"go/build"
	"go/parser"
	"go/token"
	"go/types"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
)

// The house rules of CONTRIBUTING.md.
const (
	maxFunction = 60   // lines
	maxStruct   = 12   // fields
	maxTests    = 1000 // lines of a test file
	maxColumns  = 100  // of a line, where a tab is one
	maxLong     = 10   // lines of more columns: rows of tables and raw strings
)

// house is the daemon's source.
type house struct {
	fset *token.FileSet
	row  map[string]int // of a file in the table of CONTRIBUTING.md
}

func newHouse(t *testing.T) *house {
	t.Helper()
	_, table, _ := strings.Cut(harness.ReadFile(t, "CONTRIBUTING.md"), "\n## Files\n")
	table, _, _ = strings.Cut(table, "\n\nTests")
	h := &house{token.NewFileSet(), map[string]int{}}
	for i, row := range regexp.MustCompile("(?m)^\\| (`.*?) \\|").FindAllString(table, -1) {
		for _, file := range harness.AllOf("`([^`]+)`", row) {
			h.row[file] = i
		}
	}
	return h
}

// load returns the package for an operating system, as far as it is known without its imports.
func (h *house) load(t *testing.T, system string) ([]*ast.File, *types.Info) {
	t.Helper()
	context := build.Default
	context.GOOS = system
	sources, err := context.ImportDir(harness.Top(t), 0)
	harness.Must(t, err)
	var files []*ast.File
	for _, name := range sources.GoFiles {
		path := filepath.Join(sources.Dir, name)
		file, err := parser.ParseFile(h.fset, path, nil, parser.SkipObjectResolution)
		harness.Must(t, err)
		files = append(files, file)
	}
	info := &types.Info{Defs: map[*ast.Ident]types.Object{}, Uses: map[*ast.Ident]types.Object{}}
	config := types.Config{Importer: noImports{}, Error: func(error) {}}
	config.Check(sources.Name, h.fset, files, info)
	return files, info
}

// noImports leaves what is imported unknown.
type noImports struct{}

func (noImports) Import(string) (*types.Package, error) { return nil, errors.New("not imported") }

func (h *house) file(pos token.Pos) string { return filepath.Base(h.fset.Position(pos).Filename) }

// above reports whether one file is above another in the table.
func (h *house) above(one, other string) bool {
	row, listed := h.row[one]
	return listed && row < h.row[other]
}

func TestFilesAreListed(t *testing.T) {
	h := newHouse(t)
	there, err := filepath.Glob(filepath.Join(harness.Top(t), "*.go"))
	harness.Must(t, err)
	missing := maps.Clone(h.row)
	for _, path := range there {
		file := filepath.Base(path)
		if _, listed := h.row[file]; !listed && !strings.HasSuffix(file, "_test.go") {
			t.Errorf("CONTRIBUTING.md does not list %s", file)
		}
		delete(missing, file)
	}
	for file := range missing {
		t.Errorf("CONTRIBUTING.md lists %s, which is not there", file)
	}
}

func TestFilesUseOnlyWhatIsBelow(t *testing.T) {
	h := newHouse(t)
	seen := map[string]bool{}
	for _, system := range []string{"linux", "windows"} {
		files, info := h.load(t, system)
		if len(info.Uses) < 1000 {
			t.Fatalf("only %d uses of names are known", len(info.Uses))
		}
		for _, id := range slices.SortedFunc(maps.Keys(info.Uses), func(a, b *ast.Ident) int {
			return cmp.Compare(a.Pos(), b.Pos())
		}) {
			used := info.Uses[id]
			if !used.Pos().IsValid() { // Go's own, or imported
				continue
			}
			from, to := h.file(id.Pos()), h.file(used.Pos())
			if key := from + id.Name + to; h.above(to, from) && !seen[key] {
				seen[key] = true
				t.Errorf("%s:%d uses %s, which is in %s, above it",
					from, h.fset.Position(id.Pos()).Line, id.Name, to)
			}
		}
		for _, file := range files {
			for _, spec := range file.Imports {
				key := h.file(file.Pos()) + spec.Path.Value
				if strings.Contains(key, "/script/") && !seen[key] {
					seen[key] = true
					t.Errorf("%s imports %s, which is for tests", h.file(file.Pos()), spec.Path.Value)
				}
			}
			for _, decl := range file.Decls {
				h.checkMethod(t, decl, info, seen)
			}
		}
	}
}

// checkMethod complains of a method that is not in the file of its type, or of its row.
func (h *house) checkMethod(
	t *testing.T, decl ast.Decl, info *types.Info, seen map[string]bool,
) {
	t.Helper()
	function, _ := decl.(*ast.FuncDecl)
	if function == nil || function.Recv == nil {
		return
	}
	method, _ := info.Defs[function.Name].(*types.Func)
	receiver := method.Signature().Recv().Type()
	if pointer, isPointer := receiver.(*types.Pointer); isPointer {
		receiver = pointer.Elem()
	}
	named, _ := receiver.(*types.Named)
	if named == nil {
		t.Fatalf("%s: the receiver of %s is unknown", h.fset.Position(function.Pos()), method.Name())
	}
	of, in := h.file(named.Obj().Pos()), h.file(function.Pos())
	if key := in + method.FullName(); h.row[of] != h.row[in] && !seen[key] {
		seen[key] = true
		t.Errorf("%s has the method %s of %s, which is in %s", in, method.Name(), named.Obj().Name(), of)
	}
}

// goFiles returns all Go files of the repository by their paths, parsed.
func goFiles(t *testing.T) (*token.FileSet, map[string]*ast.File) {
	t.Helper()
	fset, files := token.NewFileSet(), map[string]*ast.File{}
	for _, path := range tracked(t) {
		if strings.HasSuffix(path, ".go") {
			text := harness.ReadFile(t, path)
			file, err := parser.ParseFile(fset, path, text, parser.SkipObjectResolution)
			harness.Must(t, err)
			files[path] = file
		}
	}
	return fset, files
}

// tracked returns the files that Git knows and that are there.
func tracked(t *testing.T) (files []string) {
	t.Helper()
	list := exec.Command("git", "ls-files", "-z")
	list.Dir = harness.Top(t)
	out, err := list.Output()
	if err != nil {
		harness.Cannot(t, "git does not list the files: %v", err)
	}
	for path := range strings.SplitSeq(strings.TrimSuffix(string(out), "\x00"), "\x00") {
		if _, err := os.Lstat(filepath.Join(list.Dir, path)); err == nil {
			files = append(files, path)
		}
	}
	return files
}

func TestTestFilesAreShort(t *testing.T) {
	_, files := goFiles(t)
	for _, path := range slices.Sorted(maps.Keys(files)) {
		if n := strings.Count(harness.ReadFile(t, path), "\n"); n > maxTests &&
			strings.HasSuffix(path, "_test.go") {
			t.Errorf("%s has %d lines, more than %d", path, n, maxTests)
		}
	}
}

func TestDependabotKnowsEachModule(t *testing.T) {
	known := harness.ReadFile(t, ".github/dependabot.yml")
	modules := harness.AllOf(`directories: \[(.*)\]`, known)
	for _, path := range tracked(t) {
		if filepath.Base(path) != "go.mod" {
			continue
		}
		module := filepath.Clean("/" + filepath.Dir(path))
		if len(modules) != 1 || !slices.Contains(strings.Split(modules[0], ", "), module) {
			t.Errorf("Dependabot knows %q, not %s", modules, module)
		}
	}
}

// The version in an image is Git's. Were a file missing there that Git knows, it would be +dirty.
func TestImageIsBuiltOfAllThatGitKnows(t *testing.T) {
	list := exec.Command("git", "ls-files", "--cached", "--ignored", "--exclude-from=.dockerignore")
	list.Dir = harness.Top(t)
	out, err := list.Output()
	if err != nil {
		harness.Cannot(t, "git does not list the files: %v", err)
	}
	if len(out) > 0 {
		t.Errorf(".dockerignore leaves out\n%s", out)
	}
}

func TestFunctionsAndStructsAreSmall(t *testing.T) {
	fset, files := goFiles(t)
	for path, file := range files {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		ast.Inspect(file, func(node ast.Node) bool {
			switch node := node.(type) {
			case *ast.FuncDecl:
				first, last := fset.Position(node.Pos()), fset.Position(node.End())
				if n := last.Line - first.Line + 1; n > maxFunction {
					t.Errorf("%s: %s has %d lines, more than %d", first, node.Name.Name, n, maxFunction)
				}
			case *ast.StructType:
				if n := node.Fields.NumFields(); n > maxStruct {
					t.Errorf("%s: a struct of %d fields, more than %d", fset.Position(node.Pos()), n, maxStruct)
				}
			}
			return true
		})
	}
}

func TestLinesAreShort(t *testing.T) {
	fset, files := goFiles(t)
	long := 0
	for _, path := range slices.Sorted(maps.Keys(files)) {
		may := mayBeLong(fset, files[path])
		for i, line := range strings.Split(harness.ReadFile(t, path), "\n") {
			n := utf8.RuneCountInString(line)
			if n <= maxColumns {
				continue
			}
			if long++; !may[i+1] || long > maxLong {
				t.Errorf("%s:%d: %d columns, more than %d", path, i+1, n, maxColumns)
			}
		}
	}
}

// mayBeLong returns the lines of rows of tables and of raw strings.
func mayBeLong(fset *token.FileSet, file *ast.File) map[int]bool {
	lines := map[int]bool{}
	mark := func(node ast.Node) {
		for line := fset.Position(node.Pos()).Line; line <= fset.Position(node.End()).Line; line++ {
			lines[line] = true
		}
	}
	ast.Inspect(file, func(node ast.Node) bool {
		switch node := node.(type) {
		case *ast.BasicLit:
			if strings.HasPrefix(node.Value, "`") {
				mark(node)
			}
		case *ast.CompositeLit:
			for _, row := range node.Elts {
				if _, isRow := row.(*ast.CompositeLit); isRow {
					mark(row)
				}
			}
		}
		return true
	})
	return lines
}
