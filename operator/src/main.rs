//! `expertmesh`, the program.

fn main() -> std::process::ExitCode {
    expertmesh::main()
}
