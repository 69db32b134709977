fn main() -> std::process::ExitCode {
    podium::cli::main()
}
