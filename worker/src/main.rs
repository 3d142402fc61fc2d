//! `expertmesh-worker`, the program.

fn main() -> std::process::ExitCode {
    expertmesh_worker::main()
}
